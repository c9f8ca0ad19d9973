#!/usr/bin/env bash
# The whole chain on the shipped rows: minutes on two cores, no GPU, no network. Results: runs/demo.
# A line that has run already does nothing, so a chain that was stopped is simply run again.
set -euo pipefail

rlhf-cli sft
rlhf-cli reward
rlhf-cli ppo algo=ppo_ptx
rlhf-cli dpo
rlhf-cli grpo
rlhf-cli generate
rlhf-cli evaluate
rlhf-cli report name=demo # runs/demo/report.html: all of it as a page
