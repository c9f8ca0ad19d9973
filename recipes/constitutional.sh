#!/usr/bin/env bash
# Constitutional AI (2212.08073): a model criticises and revises its responses by principles, and sft
# imitates that; then a model says by the same principles which of two responses is better, a reward
# model learns how sure it is, and PPO goes by that. Results: runs/NAME. A line that has run already
# does nothing, so what was stopped is simply run again.
#
#   recipes/constitutional.sh                              hub model and dataset; wants a GPU
#   JUDGE="judge=https://host/v1 judge_model=NAME judge_prices=[0.5,1.5] judge_max_cost=20" \
#     REVISER="reviser=https://host/v1 reviser_model=NAME" recipes/constitutional.sh
#   PRINCIPLES=mine.txt DATA="data=jsonl data.path=prompts.jsonl" recipes/constitutional.sh
#
# POLICY      what is made better: a folder or hub id of a model that follows instructions
# JUDGE       which model judges; POLICY itself where it is not set
# REVISER     which model criticises and revises; POLICY itself where it is not set
# PRINCIPLES  a file, one on each line
# DATA        where prompts come from
# NAME        results go to runs/NAME
# COMMON, SFT, LABEL, REWARD, PPO, EVALUATE: more overrides, for every line or for one of them
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-constitutional}
POLICY=${POLICY:-HuggingFaceTB/SmolLM2-135M-Instruct}
PRINCIPLES=${PRINCIPLES:-$(dirname "$0")/principles.txt}
prompts=(name="$NAME" ${DATA:-data=hh data.path=Anthropic/hh-rlhf} data.eval_share=0.05 ${COMMON:-})
rows=(name="$NAME" data.eval_share=0.05 ${COMMON:-})

rlhf-cli generate "${prompts[@]}" policy="$POLICY" algo.prompts=5000 algo.revisions=2 \
  principles="$PRINCIPLES" out="runs/$NAME/revise" ${REVISER:-}

rlhf-cli sft "${rows[@]}" data=rows data.path="runs/$NAME/revise/demonstrations.jsonl" \
  model=pretrained model.path="$POLICY" algo.text_mix=0 algo.epochs=1 ${SFT:-}

# no tie: a pair that the judge is not sure of says that by its soft label
rlhf-cli label "${prompts[@]}" source=judge ${JUDGE:-judge="$POLICY"} principles="$PRINCIPLES" \
  judge_tie=0 algo.protocol=pair algo.samples=2 algo.prompts=5000 ${LABEL:-}

rlhf-cli reward "${rows[@]}" data=jsonl data.path="runs/$NAME/label/preferences.jsonl" \
  algo.soft_labels=true algo.epochs=1 ${REWARD:-}

rlhf-cli ppo "${prompts[@]}" ${PPO:-}

rlhf-cli evaluate "${prompts[@]}" baselines="[runs/$NAME/sft]" gold=null ${EVALUATE:-}
