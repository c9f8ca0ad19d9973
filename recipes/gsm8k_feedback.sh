#!/usr/bin/env bash
# Models' solutions of problems, marked right or wrong, in every way that such feedback can be used:
# imitated, ranked, judged whole, judged step by step, and learnt from without a reward model.
# Results: runs/NAME. A line that has run already does nothing.
#
#   recipes/gsm8k_feedback.sh                              hub model; wants a GPU
#   COMMON="hardware=gpu" recipes/gsm8k_feedback.sh
#   MODEL=path/to/tiny/model DATA=solutions.jsonl recipes/gsm8k_feedback.sh  minutes on two cores
#
# MODEL  hub id or folder of a pretrained model
# DATA   file or folder of problems under `question`, with {solution, is_correct} under the name of
#        each model; github.com/openai/grade-school-math has example_model_solutions.jsonl
# NAME   results go to runs/NAME
# COMMON, SFT, KWISE, POINTWISE, PROCESS, KTO, PLACKETT_LUCE: more overrides, for every line or for
#        one of them; what is too long for a small model is left out, and
#        COMMON="data.max_response_tokens=320" takes more
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-gsm8k_feedback}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}

# A local model of a few million parameters runs on a laptop, at rates and sizes that suit it. It
# learns the judgements it is shown, and judges other solutions hardly better than a coin.
size=$(du -sm "$MODEL" 2>/dev/null | cut -f1 || true)
if [ "${size:-1000}" -lt 50 ]; then
  COMMON="data.max_prompt_tokens=224 data.max_response_tokens=272 data.long_prompts=drop \
    data.long_responses=drop data.max_rows=800 data.eval_rows=60 ${COMMON:-}"
  SFT="algo.lr=2e-3 algo.batch_size=16 algo.epochs=2 algo.eval_every=20 ${SFT:-}"
  KWISE="algo.lr=2e-3 algo.batch_size=8 algo.epochs=3 algo.eval_every=10 ${KWISE:-}"
  POINTWISE="algo.lr=1e-3 algo.batch_size=16 algo.epochs=2 ${POINTWISE:-}"
  PROCESS="algo.lr=1e-3 algo.batch_size=16 algo.epochs=2 ${PROCESS:-}"
  KTO="algo.lr=5e-4 algo.batch_size=16 algo.warmup_steps=5 algo.eval_every=10 ${KTO:-}"
  PLACKETT_LUCE="algo.lr=2e-4 algo.batch_size=8 algo.epochs=2 algo.warmup_steps=5 \
    algo.eval_every=10 ${PLACKETT_LUCE:-}"
fi

common=(name="$NAME" data=gsm8k_solutions data.path="${DATA:-example_model_solutions.jsonl}"
  ${COMMON:-})
ranking='data.convert=[feedback_to_ranking]' # right above wrong, and all right ones tied
stepwise='data.convert=[feedback_to_stepwise]' # a step is as right as the answer that it led to

# The defaults of conf/ suit the demo's small model. Rates, batches and epochs here are those
# published for models of 0.1 to 7 billion parameters.

# the right solutions only
rlhf-cli sft "${common[@]}" model=pretrained model.path="$MODEL" \
  algo.lr=2e-5 algo.epochs=2 algo.batch_size=64 ${SFT:-}

# all pairs of right and wrong that a problem has, its solutions in one batch (InstructGPT)
rlhf-cli reward "${common[@]}" algo=kwise "$ranking" out="runs/$NAME/kwise" \
  algo.lr=9e-6 algo.epochs=1 algo.batch_size=16 ${KWISE:-}

# the probability that a solution is right (Cobbe et al.)
rlhf-cli reward "${common[@]}" algo=pointwise out="runs/$NAME/pointwise" \
  algo.lr=1e-5 algo.epochs=1 algo.batch_size=64 ${POINTWISE:-}

# the same, at the end of each line of the solution
rlhf-cli reward "${common[@]}" algo=process "$stepwise" out="runs/$NAME/process" \
  algo.lr=1e-5 algo.epochs=1 algo.batch_size=64 ${PROCESS:-}

rlhf-cli dpo "${common[@]}" algo=kto out="runs/$NAME/kto" \
  algo.beta=0.1 algo.lr=1e-6 algo.epochs=1 algo.batch_size=64 ${KTO:-}

rlhf-cli dpo "${common[@]}" algo=plackett_luce "$ranking" out="runs/$NAME/plackett_luce" \
  algo.beta=0.1 algo.lr=1e-6 algo.epochs=1 algo.batch_size=16 ${PLACKETT_LUCE:-}
