"""What rows cost: processor time and memory of a stage up to its first step, by how many there are.

    rlhf-cli sft && python benchmarks/rows.py runs/demo/sft

Makes files of short preference rows in a temporary folder, starts `rlhf-cli dpo` on each until its
first step is logged, once from nothing and once more with the tokens that the first run has kept,
and asks `--check` what it predicts. Linux only: figures are read from /proc.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = ["data.max_prompt_tokens=90", "data.max_response_tokens=38"]
POLL = 0.02  # seconds
IN_ALL = re.compile(r"rows: ([\d.]+) (MiB|GiB) on a CPU")


def write_rows(file: Path, count: int) -> None:
    """Pairs whose prompts are all different."""
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            row = {
                "prompt": f"Mia asks ({i}): How many legs does a bee have?",
                "chosen": f"Hello! A bee has {i % 9} legs. Thank you!",
                "rejected": f"A bee has {i % 7} legs, {i % 97} times. Stop it!",
            }
            stream.write(json.dumps(row) + "\n")


def first_step(words: list[str], out: Path) -> tuple[float, float]:
    """Seconds of processor time until the first step is logged, and the peak by then, in GB."""
    process = subprocess.Popen(
        ["rlhf-cli", *words, f"out={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, status = out / "metrics.jsonl", Path(f"/proc/{process.pid}")
    seconds, peak = 0.0, 0.0
    while not (log.is_file() and log.stat().st_size):
        if process.poll() is not None:
            sys.exit(f"rlhf-cli ended with {process.returncode}")
        fields = (status / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        match = re.search(r"VmHWM:\s+(\d+)", (status / "status").read_text())
        peak = int(match[1]) * 1024 / 1e9 if match else peak
        time.sleep(POLL)
    process.send_signal(signal.SIGTERM)
    process.wait()
    return seconds, peak


def checked(words: list[str]) -> tuple[float, str]:
    """Seconds of processor time of --check, and what it predicts for the process."""
    before = os.times()
    done = subprocess.run(
        ["rlhf-cli", *words, "--check"], capture_output=True, text=True, check=True
    )
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    match = IN_ALL.search(done.stderr)
    return spent, " ".join(match.groups()) if match else "-"


def main() -> None:
    """Print a table for benchmarks/rows.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    print(
        "| rows | first run, s | peak, GB | tokens kept, s | peak, GB | --check, s | it predicts |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in args.counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            words = ["dpo", "data=rows", f"data.path={folder / 'rows.jsonl'}", *LIMITS]
            words += [f"policy={args.policy}", f"data.cache={folder / 'cache'}"]
            made, again = (first_step(words, folder / out) for out in ("one", "two"))
            seconds, predicted = checked([*words, f"out={folder / 'three'}"])
        figures = [f"{value:.2f}" for value in (*made, *again, seconds)]
        print(f"| {count:,} | {' | '.join(figures)} | {predicted} |", flush=True)


if __name__ == "__main__":
    main()
