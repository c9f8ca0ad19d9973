#!/usr/bin/env bash
# GRPO on problems with checkable answers: imitate the solutions, then learn from whether the final
# answer is right. No reward model. Results: runs/NAME. A line that has run already does nothing.
# Its relatives are an override away: GRPO="algo=dapo algo.kl_coef=0" samples other problems in
# place of those whose responses are all right or all wrong.
#
#   recipes/gsm8k_grpo.sh                                  hub model and dataset; wants a GPU
#   COMMON="hardware=gpu" recipes/gsm8k_grpo.sh
#   MODEL=path/to/tiny/model DATA=problems.jsonl recipes/gsm8k_grpo.sh     minutes on two cores
#
# MODEL     hub id or folder of a pretrained model
# DATA      hub dataset, file or folder of problems under `question` and `answer`
# VERIFIER  what a response is worth, a sum of terms: exact_answer, or math_answer, which also sees
#           that 1/2 is 0.5 and x+1 is 1+x
# NAME      results go to runs/NAME
# COMMON, SFT, GRPO, GENERATE, EVALUATE: more overrides, for every line or for one of them; what is
#           too long for a small model is left out, COMMON="data.max_response_tokens=256" takes more
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-gsm8k}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}

# A local model of a few million parameters runs on a laptop, at rates and sizes that suit it. It is
# right by chance only, and groups that are all wrong teach nothing: some credit for coming to an
# answer at all gives it something to learn.
size=$(du -sm "$MODEL" 2>/dev/null | cut -f1 || true)
if [ "${size:-1000}" -lt 50 ]; then
  COMMON="data.max_prompt_tokens=192 data.max_response_tokens=192 data.long_prompts=drop \
    data.long_responses=drop data.max_rows=1500 ${COMMON:-}"
  SFT="algo.lr=2e-3 algo.batch_size=16 algo.epochs=1 ${SFT:-}"
  : "${VERIFIER:=exact_answer + 0.2*regex:#### [0-9]}"
  GRPO="algo.lr=1e-4 algo.batch_size=8 algo.minibatch_size=8 algo.group_size=8 algo.steps=20 \
    ${GRPO:-}"
fi

common=(name="$NAME" data=gsm8k data.path="${DATA:-openai/gsm8k:main}" ${COMMON:-})
reward="reward='${VERIFIER:-exact_answer}'"
grpo=(policy="runs/$NAME/grpo" "$reward")

# The defaults of conf/ suit the demo's small model. Rates, batches and epochs here are those
# published for models of 0.1 to 7 billion parameters.

rlhf-cli sft "${common[@]}" model=pretrained model.path="$MODEL" \
  algo.lr=2e-5 algo.epochs=3 algo.batch_size=64 ${SFT:-}

# 16 prompts x 64 responses and one update, as in the paper: with fewer, groups are all wrong or
# all right more often, and those teach nothing
rlhf-cli grpo "${common[@]}" "$reward" algo.lr=1e-6 algo.kl_coef=0.04 \
  algo.batch_size=16 algo.minibatch_size=16 algo.group_size=64 algo.epochs=1 algo.steps=200 \
  ${GRPO:-}

rlhf-cli generate "${common[@]}" "${grpo[@]}" ${GENERATE:-}

rlhf-cli evaluate "${common[@]}" "${grpo[@]}" ${EVALUATE:-}
