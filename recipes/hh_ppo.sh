#!/usr/bin/env bash
# InstructGPT's three steps on dialogues: imitate the chosen replies, learn what people prefer, then
# PPO against that. Results: runs/NAME. A line that has run already does nothing.
#
#   recipes/hh_ppo.sh                                      hub model and dataset; wants a GPU
#   COMMON="hardware=gpu" recipes/hh_ppo.sh
#   MODEL=path/to/tiny/model DATA=dialogues.jsonl recipes/hh_ppo.sh     minutes on two cores
#
# MODEL  hub id or folder of a pretrained model
# DATA   hub dataset, file or folder of dialogues under `chosen` and `rejected`
# TEXT   plain text rows; where given, ppo becomes ppo_ptx
# NAME   results go to runs/NAME
# COMMON, SFT, REWARD, PPO, GENERATE, EVALUATE: more overrides, for every line or for one of them
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
  PPO="algo.lr=1e-4 algo.value_lr=1e-3 algo.kl_coef=0.1 algo.batch_size=32 \
    algo.minibatch_size=16 algo.epochs=2 algo.steps=30 ${PPO:-}"
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

rlhf-cli ppo "${common[@]}" ${TEXT:+algo=ppo_ptx data.text_path="$TEXT"} \
  algo.lr=3e-6 algo.value_lr=9e-6 algo.kl_coef=0.05 \
  algo.batch_size=128 algo.minibatch_size=64 algo.epochs=1 algo.steps=200 ${PPO:-}

rlhf-cli generate "${common[@]}" reward="runs/$NAME/reward" ${GENERATE:-}

rlhf-cli evaluate "${common[@]}" ${EVALUATE:-}
