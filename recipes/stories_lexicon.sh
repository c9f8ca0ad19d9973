#!/usr/bin/env bash
# PPO towards glad stories: a language model continues beginnings of stories, and a list of words
# says how glad each continuation is. No labels and no reward model: the smallest run there is on
# rows of one's own. Results: runs/NAME. A line that has run already does nothing.
#
#   DATA=starts.jsonl recipes/stories_lexicon.sh           hub model; wants a GPU
#   COMMON="hardware=gpu" DATA=starts.jsonl recipes/stories_lexicon.sh
#   MODEL=path/to/tiny/model DATA=starts.jsonl recipes/stories_lexicon.sh   minutes on two cores
#
# MODEL    hub id or folder of a pretrained model
# DATA     file of beginnings of stories under `prompt`; 100 are enough for a first look
# LEXICON  file of WORD or WORD<tab>WEIGHT; by default positive.txt beside this recipe, of which
#          `rlhf-cli cp positive.txt .` makes a copy to change
# NAME     results go to runs/NAME
# COMMON, PPO, GENERATE, EVALUATE: more overrides, for every line or for one of them
#
# The variables are split into words on purpose: each holds several overrides.
# shellcheck disable=SC2086,SC2206
set -euo pipefail

NAME=${NAME:-stories}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}
LEXICON=${LEXICON:-$(dirname "$0")/positive.txt}

# A local model of a few million parameters runs on a laptop, at rates and sizes that suit it.
size=$(du -sm "$MODEL" 2>/dev/null | cut -f1 || true)
if [ "${size:-1000}" -lt 50 ]; then
  PPO="algo.lr=2e-4 algo.value_lr=1e-3 algo.batch_size=64 algo.minibatch_size=32 algo.epochs=2 \
    algo.steps=40 ${PPO:-}"
fi

common=(name="$NAME" data=jsonl data.path="${DATA:-starts.jsonl}" data.eval_rows=20
  data.max_prompt_tokens=48 data.max_response_tokens=64 ${COMMON:-})
lexicon="reward='lexicon:$LEXICON'"

# The KL holds the policy to its language: with a quarter of this kl_coef it soon says the gladdest
# words again and again, and the alarms tell. A continuation has no end, so none is missed. The
# weights of words are small, and divided by their deviation they suit any lexicon.
rlhf-cli ppo "${common[@]}" "$lexicon" policy="$MODEL" algo.missing_eos_reward=null \
  algo.scale_rewards=true algo.kl_coef=0.2 algo.max_kl=20 algo.max_repetition=0.1 \
  algo.min_entropy=0.5 algo.lr=3e-6 algo.value_lr=9e-6 algo.batch_size=128 \
  algo.minibatch_size=64 algo.epochs=1 algo.steps=100 ${PPO:-}

# the same prompts before and after
for step in before after; do
  policy=$MODEL
  [ $step = before ] || policy=runs/$NAME/ppo
  rlhf-cli generate "${common[@]}" "$lexicon" policy="$policy" out="runs/$NAME/$step" ${GENERATE:-}
done

rlhf-cli evaluate "${common[@]}" "$lexicon" reference="$MODEL" baselines="['$MODEL']" ${EVALUATE:-}
