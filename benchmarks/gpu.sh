#!/usr/bin/env bash
# Timings on one GPU, in at most 8 minutes: a JSON line per run as it ends, and a table at the end.
#
#     benchmarks/gpu.sh [WORDS OF speed.py]      WHEELS=.whl ROWS=hh.jsonl OUT=/tmp/speed
#
# Nothing is fetched: what this Python lacks beside torch and transformers comes from the folder
# WHEELS, where there is one (README of the figures: benchmarks/speed.md). Without ROWS, a file of
# HH's JSON lines, rows are made up. Lines go to $OUT/results.jsonl, what failed runs said last to
# the lines themselves.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
wheels=${WHEELS:-.whl} out=${OUT:-/tmp/speed} site=$(mktemp -d)
mkdir -p "$out"
if [ -d "$wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
rows=()
[ -n "${ROWS:-}" ] && rows=(--rows "$ROWS")
# the limits come first, so that later words win
exec python3 benchmarks/speed.py --limit 90 --budget 450 --folder "${FOLDER:-/tmp/rlhf-cli-speed}" \
    --lines "$out/results.jsonl" "${rows[@]}" "$@"
