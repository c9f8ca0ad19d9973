"""The demo chain over several seeds, through the console script: the table of docs/evaluation.md.

    python benchmarks/demo_seeds.py [SEEDS] [FOLDER]

Trains sft, reward, ppo, ppo_ptx, dpo and grpo at each seed, evaluates them on the held-out prompts
(200 prompts x 4 responses), and prints markdown. `z` is the paired difference of gold to SFT over
its standard error, clustered by prompt: the samples of all policies answer the same prompts.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_cli.data.rows import DEMO_FOLDER
from rlhf_cli.demo.gold import gold_score

STAGES = (
    "sft",
    "reward",
    "ppo",
    "ppo algo=ppo_ptx out=runs/{name}/ppo_ptx",
    "dpo",
    "grpo",
    "evaluate algo.prompts=200",
)


def run_chain(seed: int) -> Path:
    """Run every stage at one seed; finished stages are not run again."""
    name = f"seed{seed}"
    for stage in STAGES:
        words = f"rlhf-cli {stage} name={{name}} seed={seed}".format(name=name).split()
        print(*words, file=sys.stderr, flush=True)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return Path("runs") / name


def best_accuracy() -> tuple[float, float]:
    """Held-out accuracy of the gold score itself: expected over label noise, and on these labels.

    The labels of a pair follow sigmoid of the gold margin d, so no scorer can expect to agree with
    more than E[sigmoid(|d|)] of them.
    """
    lines = (DEMO_FOLDER / "preferences.eval.jsonl").read_text(encoding="utf-8").splitlines()
    expected = observed = 0.0
    for row in map(json.loads, lines):
        chosen, rejected = (gold_score(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        margin = chosen - rejected
        expected += 1 / (1 + math.exp(-abs(margin)))
        observed += 0.5 if margin == 0 else float(margin > 0)
    return expected / len(lines), observed / len(lines)


def row_of(folder: Path, policy: str, report: dict[str, Any]) -> list[str]:
    """One policy's figures at one seed."""
    found = report["policies"][str(folder / policy)]
    pairs = [f"{found[key]['mean']:.2f} ± {found[key]['stderr']:.2f}" for key in ("gold", "kl")]
    gain = found["gain_over_reference"]
    z = gain["mean"] / gain["stderr"] if policy != "sft" else None
    return [*pairs, f"{found['text_loss']:.3f}", "-" if z is None else f"{z:.1f}"]


def main(seeds: int) -> None:
    """Run and print."""
    folders = [run_chain(seed) for seed in range(seeds)]
    expected, observed = best_accuracy()
    print(f"\nbest accuracy under the label noise: {expected:.3f} expected, {observed:.3f} here\n")
    print("| seed | reward model accuracy | log loss | seconds |\n|---|---|---|---|")
    for seed, folder in enumerate(folders):
        stage = json.loads((folder / "reward" / "stage.json").read_text())
        metrics = stage["metrics"]
        accuracy = f"{metrics['eval/accuracy']:.3f} ± {metrics['eval/accuracy_stderr']:.3f}"
        print(f"| {seed} | {accuracy} | {metrics['eval/loss']:.3f} | {stage['seconds']} |")
    print("\n| policy | seed | gold | KL to SFT | text loss | z of gold against SFT |")
    print("|---|---|---|---|---|---|")
    for policy in ("sft", "ppo", "ppo_ptx", "dpo", "grpo"):
        for seed, folder in enumerate(folders):
            report = json.loads((folder / "evaluate" / "report.json").read_text())
            print(f"| {policy} | {seed} | {' | '.join(row_of(folder, policy, report))} |")


if __name__ == "__main__":
    os.chdir(sys.argv[2] if len(sys.argv) > 2 else ".")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
