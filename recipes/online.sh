#!/usr/bin/env bash
# Rounds of online RLHF as in Bai et al. 2022 (2204.05862): responses of the best policy so far are
# labelled beside those of SFT, a reward model learns anew from the labels of all rounds, the newest
# as heavy as all before it, and PPO starts anew from SFT. ppo refuses a reward model that orders
# held-out labels, or those of one round, the wrong way round. Rounds end once two running have not
# gained over the one before. Results: runs/NAME. A line that has run already does nothing, so what
# was stopped is simply run again.
#
#   recipes/online.sh                                          the demo, labelled by a rule that errs
#   LABEL="source=page annotators=[ana,bob]" recipes/online.sh                 labelled by people
#   DATA="data=rows data.path=prompts.jsonl" POLICY=runs/mine/sft recipes/online.sh
#
# ROUNDS    how many at most
# POLICY    what rounds start from; without it the demo's sft is made
# DATA      where prompts come from, for label, ppo and evaluate
# HELD_OUT  share of the prompts, by their hash, from which no round learns
# NAME      results go to runs/NAME
# COMMON, LABEL, REWARD, PPO, EVALUATE: more overrides, for every line or for one of them
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-online}
common=(name="$NAME" ${COMMON:-})
DATA=${DATA:-data=demo}
LABEL=${LABEL:-source=reward reward=demo_gold flip=0.25 algo.prompts=200}
EVALUATE=${EVALUATE:-gold=demo_gold}

if [ -z "${POLICY:-}" ]; then
  POLICY=runs/$NAME/sft
  rlhf-cli sft "${common[@]}"
fi

best=$POLICY
asked= older= policies=$POLICY evaluations=
for round in $(seq "${ROUNDS:-3}"); do
  here=runs/$NAME/round$round
  share=data.eval_share=${HELD_OUT:-0.2}

  # prompts that no round has asked yet
  rlhf-cli label "${common[@]}" $DATA policy="$best" asked="[$asked]" \
    baselines="[$([ "$best" = "$POLICY" ] || echo "$POLICY")]" out="$here/label" $LABEL

  rows="path: $here/label/rankings.jsonl, name: round$round"
  newest="{$rows, weight: $((round > 1 ? round - 1 : 1))}" # each older round weighs 1
  rlhf-cli reward algo=kwise "${common[@]}" policy="$POLICY" data=jsonl "$share" \
    data.sources="[$older$newest]" out="$here/reward" ${REWARD:-}

  rlhf-cli ppo "${common[@]}" $DATA "$share" policy="$POLICY" reward="$here/reward" \
    out="$here/ppo" ${PPO:-}

  # fixed anchors rate all rounds: scores of two reward models cannot be compared, wins can
  rlhf-cli evaluate "${common[@]}" $DATA "$share" policy="$here/ppo" baselines="[$policies]" \
    reference="$POLICY" anchor="$POLICY" reward="$here/reward" \
    responses_cache="runs/$NAME/responses" out="$here/evaluate" $EVALUATE

  evaluations="$evaluations $here/evaluate"
  best=$(rlhf-cli rounds $evaluations)
  [ -n "$best" ] || break
  asked=${asked:+$asked,}$here/label/tasks.jsonl
  older="$older{$rows, weight: 1}, "
  policies=$policies,$here/ppo
done
