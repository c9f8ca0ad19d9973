#!/usr/bin/env bash
# Rounds of labels: the newest policy is sampled beside SFT, people or a stand-in rank the responses,
# a reward model learns anew from the labels of all rounds, and PPO starts anew from SFT, as in Bai et
# al. 2022 (2204.05862). A reward model that is no better than a coin ends it: ppo checks. Results:
# runs/NAME. A line that has run already does nothing, so what was stopped is simply run again.
#
#   recipes/online.sh                                          the demo, labelled by a rule that errs
#   LABEL="source=page annotators=[ana,bob]" recipes/online.sh                 labelled by people
#   DATA="data=jsonl data.path=prompts.jsonl" POLICY=runs/mine/sft recipes/online.sh
#
# ROUNDS  how many
# POLICY  what rounds start from; without it the demo's sft is made
# DATA    where prompts come from, for label, ppo and evaluate
# NAME    results go to runs/NAME
# LABEL, REWARD, PPO, EVALUATE: more overrides, for one of the lines
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086
set -euo pipefail

NAME=${NAME:-online}
DATA=${DATA:-data=demo}
LABEL=${LABEL:-source=reward reward=demo_gold flip=0.25}
EVALUATE=${EVALUATE:-gold=demo_gold}

if [ -z "${POLICY:-}" ]; then
  POLICY=runs/$NAME/sft
  rlhf-cli sft name="$NAME"
fi

newest=$POLICY
rankings=
policies=$POLICY
for round in $(seq "${ROUNDS:-3}"); do
  here=runs/$NAME/round$round
  baselines=$([ "$newest" = "$POLICY" ] || echo "$POLICY")
  # another seed each round: the same prompts get other responses
  rlhf-cli label name="$NAME" $DATA policy="$newest" baselines="[$baselines]" seed="$round" \
    out="$here/label" $LABEL
  rankings=${rankings:+$rankings,}$here/label/rankings.jsonl
  rlhf-cli reward algo=kwise name="$NAME" policy="$POLICY" data=jsonl data.path="[$rankings]" \
    data.eval_share=0.1 out="$here/reward" ${REWARD:-}
  rlhf-cli ppo name="$NAME" $DATA policy="$POLICY" reward="$here/reward" out="$here/ppo" ${PPO:-}
  newest=$here/ppo
  policies=$policies,$newest
done

# fixed anchors rate all rounds: scores of two reward models cannot be compared, wins can
rlhf-cli evaluate name="$NAME" $DATA policy="$newest" baselines="[${policies%,*}]" \
  reference="$POLICY" anchor="$POLICY" reward="$here/reward" out="runs/$NAME/evaluate" $EVALUATE
