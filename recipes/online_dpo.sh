#!/usr/bin/env bash
# Rounds of online DPO: online.sh without a reward model. Responses of the best policy so far are
# labelled beside those of SFT, and DPO learns anew from the pairs of all rounds, the newest as heavy
# as all before it. It starts from SFT each time, as Bai et al. 2022 (2204.05862) start theirs, which
# leaves no round's labels behind; RLHF Workflow (2405.07863) goes on from the policy of the round
# before. Rounds end once two running have not gained over the one before. Results: runs/NAME. A line
# that has run already does nothing, so what was stopped is simply run again.
#
#   recipes/online_dpo.sh                                      the demo, labelled by a rule that errs
#   LABEL="source=page annotators=[ana,bob] algo.protocol=pair" recipes/online_dpo.sh       by people
#   DATA="data=rows data.path=prompts.jsonl" POLICY=runs/mine/sft recipes/online_dpo.sh
#
# ROUNDS    how many at most
# POLICY    what rounds start from; without it the demo's sft is made
# DATA      where prompts come from, for label and evaluate
# HELD_OUT  share of the prompts, by their hash, from which no round learns
# NAME      results go to runs/NAME
# COMMON, LABEL, DPO, EVALUATE: more overrides, for every line or for one of them
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-online_dpo}
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

  rows="path: $here/label/preferences.jsonl, name: round$round"
  newest="{$rows, weight: $((round > 1 ? round - 1 : 1))}" # each older round weighs 1
  rlhf-cli dpo "${common[@]}" policy="$POLICY" data=jsonl "$share" \
    data.sources="[$older$newest]" out="$here/dpo" ${DPO:-}

  # fixed anchors rate all rounds
  rlhf-cli evaluate "${common[@]}" $DATA "$share" policy="$here/dpo" baselines="[$policies]" \
    reference="$POLICY" anchor="$POLICY" reward=null \
    responses_cache="runs/$NAME/responses" out="$here/evaluate" $EVALUATE

  evaluations="$evaluations $here/evaluate"
  best=$(rlhf-cli rounds $evaluations)
  [ -n "$best" ] || break
  asked=${asked:+$asked,}$here/label/tasks.jsonl
  older="$older{$rows, weight: 1}, "
  policies=$policies,$here/dpo
done
