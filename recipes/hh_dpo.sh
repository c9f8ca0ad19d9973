#!/usr/bin/env bash
# DPO on dialogues: imitate the chosen replies, then learn from the pairs without a reward model.
# One is trained all the same, as the judge of the report. Results: runs/NAME. A line that has run
# already does nothing: sft and reward are those of hh_ppo.sh, so after that recipe they are there,
# and the report compares ppo with dpo.
#
#   recipes/hh_dpo.sh                                      hub model and dataset; wants a GPU
#   COMMON="hardware=gpu" recipes/hh_dpo.sh
#   MODEL=path/to/tiny/model DATA=dialogues.jsonl recipes/hh_dpo.sh     minutes on two cores
#
# MODEL  hub id or folder of a pretrained model
# DATA   hub dataset, file or folder of dialogues under `chosen` and `rejected`
# NAME   results go to runs/NAME
# COMMON, SFT, REWARD, DPO, GENERATE, EVALUATE: more overrides, for every line or for one of them
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-hh}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}

# A local model of a few million parameters runs on a laptop, at rates and sizes that suit it.
size=$(du -sm "$MODEL" 2>/dev/null | cut -f1 || true)
if [ "${size:-1000}" -lt 50 ]; then
  COMMON="data.max_prompt_tokens=128 data.max_response_tokens=64 data.eval_rows=300 ${COMMON:-}"
  SFT="algo.lr=2e-3 algo.batch_size=16 algo.epochs=2 algo.eval_every=50 ${SFT:-}"
  REWARD="algo.lr=3e-4 algo.batch_size=16 algo.epochs=2 algo.eval_every=50 ${REWARD:-}"
  DPO="algo.lr=1e-4 algo.batch_size=16 algo.warmup_steps=5 algo.eval_every=50 ${DPO:-}"
fi

# 100 held-out pairs would tell the reward model's accuracy to 5 points, 500 to 2
common=(name="$NAME" data=hh data.path="${DATA:-Anthropic/hh-rlhf}" data.eval_rows=500 ${COMMON:-})

# The defaults of conf/ suit the demo's small model. Rates, batches and epochs here are those
# published for models of 0.1 to 7 billion parameters.

rlhf-cli sft "${common[@]}" model=pretrained model.path="$MODEL" \
  algo.lr=2e-5 algo.epochs=1 algo.batch_size=64 algo.eval_every=200 ${SFT:-}

# one epoch: a second one overfits (InstructGPT)
rlhf-cli reward "${common[@]}" \
  algo.lr=9e-6 algo.epochs=1 algo.batch_size=64 algo.eval_every=200 ${REWARD:-}

rlhf-cli dpo "${common[@]}" algo.beta=0.1 algo.lr=1e-6 algo.warmup_steps=150 \
  algo.epochs=1 algo.batch_size=64 algo.eval_every=200 ${DPO:-}

# out: hh_ppo.sh has its samples and its report under the default names
rlhf-cli generate "${common[@]}" policy="runs/$NAME/dpo" out="runs/$NAME/generate_dpo" \
  reward="runs/$NAME/reward" ${GENERATE:-}

rlhf-cli evaluate "${common[@]}" policy="runs/$NAME/dpo" out="runs/$NAME/evaluate_dpo" ${EVALUATE:-}
