"""What kinds of feedback and of losses do on the demo's rows, through the console script.

    python benchmarks/feedback.py [SEEDS] [FOLDER]

Trains everything at each seed under FOLDER/runs and prints the tables of benchmarks/feedback.md.
Finished stages are not run again.

    kwise_or_pairs  rankings as K-wise batches, or their comparisons shuffled as separate pairs
    more_pairs      accuracy of a reward model as its pairs grow in number
    two_rewards     the implicit reward of DPO and a reward model, on pairs like and unlike those
                    that both were trained on
    strengths       how DPO, IPO and KTO depend on beta or tau
    flipped_labels  DPO, IPO and KTO with the demo's own labels, and with 20% of them flipped
"""

import json
import os
import random
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from demo_seeds import best_accuracy

from rlhf_cli.data.rows import DEMO_FOLDER
from rlhf_cli.demo.gold import gold_score

TRAIN, HELD_OUT = (DEMO_FOLDER / f"preferences.{side}.jsonl" for side in ("train", "eval"))
PAIRS = (125, 250, 500, 1000, 2000, 4000)
FLIPPED = 0.2
LONG_EPOCHS, LONG_SEEDS = 4, 2
LOSSES = {
    "DPO": ("algo=dpo",),
    "IPO": ("algo=ipo",),
    "KTO": ("algo=kto", "algo.batch_size=64", "data.convert=[preference_to_feedback]"),
}
STRENGTHS = {"DPO": "beta=0.1", "IPO": "tau=0.05", "KTO": "beta=0.5"}
SCANNED = [("DPO", "beta=0.1")]
SCANNED += [("IPO", f"tau={tau}") for tau in (0.02, 0.05, 0.1, 0.5)]
SCANNED += [("KTO", f"beta={beta}") for beta in (0.1, 0.5, 1.0)]
LABELS = ("own", "flipped")

Row = dict[str, Any]


# --------------------------------------------------------------------------- running


def cli(stage: str, seed: int, out: str, *words: str) -> Path:
    """Run a stage at one seed in one thread; its CPU seconds go into a file beside its folder."""
    folder = Path("runs") / f"s{seed}" / out
    places = () if stage == "sft" else (f"policy=runs/s{seed}/sft",)
    command = ["rlhf-cli", stage, f"name=s{seed}", f"seed={seed}", f"out={folder}", *places]
    command += ["hardware.threads=1", *words]
    print(*command, file=sys.stderr, flush=True)
    new, before = not (folder / "stage.json").exists(), os.times().children_user
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if new:
        Path(f"{folder}.seconds").write_text(f"{os.times().children_user - before:.1f}")
    return folder


def rows_of(train: Path, held_out: Path) -> list[str]:
    """The demo's settings for rows of files."""
    return [
        "data=jsonl",
        f"data.path={train}",
        f"data.eval_path={held_out}",
        r'data.template="{prompt}\nGuide: "',
        "data.max_prompt_tokens=64",
        "data.max_response_tokens=32",
    ]


def read(path: Path) -> list[Row]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Row]) -> Path:
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def over_seeds(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds (each seed)."""
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    if len(values) < 2:
        return each
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({each})"


def table(*rows: list[str]) -> None:
    """Print markdown; the first row is the header."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


# --------------------------------------------------------------------------- reward models


def kwise_or_pairs(seeds: range) -> None:
    """600 rankings of four, 48 comparisons an optimizer step, three epochs of 75 steps."""
    kinds = {
        "rankings, K-wise": ("algo=kwise", "algo.batch_size=8"),
        "separate pairs": (
            *("algo=bradley_terry", "algo.batch_size=48"),
            "data.convert=[ranking_to_preference]",
        ),
    }
    lines = []
    for kind, words in kinds.items():
        name = words[0].removeprefix("algo=") + "_rankings"
        folders = [cli("reward", seed, name, *words, "algo.eval_every=75") for seed in seeds]
        logs = [[row for row in read(f / "metrics.jsonl") if "eval/loss" in row] for f in folders]
        spent = [float(Path(f"{folder}.seconds").read_text()) for folder in folders]
        for epoch in range(3):
            figures = [
                over_seeds([log[epoch][f"eval/{name}"] for log in logs])
                for name in ("loss", "accuracy")
            ]
            cost = over_seeds(spent, 1) if epoch == 2 else ""
            lines.append([kind, str(epoch + 1), *figures, cost])
    table(["trained on", "epoch", "held-out log loss", "held-out accuracy", "CPU seconds"], *lines)


def more_pairs(seeds: range) -> None:
    """Three epochs over the first of the demo's pairs."""
    lines = []
    for count in PAIRS:
        folders = [cli("reward", s, f"reward{count}", *pairs_of_size(count)) for s in seeds]
        reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
        figures = [over_seeds([r[name] for r in reports]) for name in ("accuracy", "loss")]
        lines.append([str(count), *figures])
    expected, observed = best_accuracy()
    print(
        f"ceiling: the gold score is right in {expected:.3f} of noisy labels as expected, in "
        f"{observed:.3f} of these\n"
    )
    table(["pairs", "held-out accuracy", "held-out log loss"], *lines)


def pairs_of_size(count: int) -> list[str]:
    """One evaluation, at the end."""
    return [f"data.max_rows={count}", "algo.eval_every=1000"]


# --------------------------------------------------------------------------- implicit, explicit


def two_rewards(seeds: range) -> None:
    """Both judge the same pairs; the report has a part for each group of pairs."""
    found: dict[tuple[str, str], list[Row]] = {}
    for seed in seeds:
        pairs = judged_pairs(seed)
        rewards = {
            "reward model": cli("reward", seed, f"reward{max(PAIRS)}", *pairs_of_size(max(PAIRS))),
            "DPO, implicit": tuned(seed, "DPO", "own", 1),
        }
        for name, folder in rewards.items():
            words = [f"reward={folder}", "reference=null", "gold=null", "baselines=[]"]
            words += [*rows_of(TRAIN, pairs), "algo.prompts=10", "algo.samples=1"]
            report = cli("evaluate", seed, f"judge_{folder.name}", *words)
            judged = json.loads((report / "report.json").read_text())["reward_model"]
            for part in judged["by_group"]:
                found.setdefault((part["group"], name), []).append(part)
    lines = [
        [group, name, str(round(statistics.mean(p["pairs"] for p in parts)))]
        + [
            f"{p['accuracy']:.3f} [{p['accuracy_low']:.3f}, {p['accuracy_high']:.3f}]"
            for p in parts
        ]
        + [f"{statistics.mean(p['accuracy'] for p in parts):.3f}"]
        for (group, name), parts in sorted(found.items())
    ]
    header = ["pairs", "scorer", "number", *(f"seed {seed}" for seed in seeds), "mean"]
    table(header, *lines)


def judged_pairs(seed: int) -> Path:
    """A file of the held-out pairs as they are, and of three kinds labelled by gold, ties dropped.

    Reversed: the same pairs with the sentences of each reply in reverse, which gold does not mind.
    Hot: replies of the SFT policy at temperature 1.5 to the held-out prompts, by twos.
    """
    words = ("algo.prompts=200", "algo.samples=4", "algo.temperature=1.5")
    replies = read(cli("generate", seed, "hot", *words) / "samples.jsonl")
    own = read(HELD_OUT)
    same = [(row["prompt"], row["chosen"], row["rejected"]) for row in own]
    turned = [(prompt, reverse(first), reverse(second)) for prompt, first, second in same]
    hot = [
        (one["prompt"], one["response"].strip(), two["response"].strip())
        for one, two in zip(replies[::2], replies[1::2], strict=True)
        if one["finish_reason"] == two["finish_reason"] == "eos"
    ]
    rows = [{**row, "source": "1 held-out, own labels"} for row in own]
    for group, pairs in (
        ("2 held-out, gold", same),
        ("3 sentences reversed, gold", turned),
        ("4 hot samples, gold", hot),
    ):
        rows += [row | {"source": group} for pair in pairs if (row := by_gold(*pair)) is not None]
    return write(Path("runs") / f"judged_s{seed}.jsonl", rows)


def reverse(reply: str) -> str:
    """Last sentence first."""
    return " ".join(reversed(reply.replace("! ", "!|").replace(". ", ".|").split("|")))


def by_gold(prompt: str, first: str, second: str) -> Row | None:
    """The pair as the gold score orders it; None at a tie or where a side is blank."""
    gap = gold_score(prompt, first) - gold_score(prompt, second)
    if gap == 0 or not first or not second:
        return None
    chosen, rejected = (first, second) if gap > 0 else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --------------------------------------------------------------------------- flipped labels


def flipped_labels(seeds: range) -> None:
    """The margin h = log-ratio of chosen less that of rejected is in nats, whatever the scale."""
    cases = list(product(LOSSES, LABELS))
    folders = {case: [tuned(seed, *case, 1) for seed in seeds] for case in cases}
    reports = [
        judged_by_gold(seed, "gold", [folders[case][seed] for case in cases]) for seed in seeds
    ]
    sft = [reports[seed][f"runs/s{seed}/sft"]["gold"]["mean"] for seed in seeds]
    lines = [["SFT", "", over_seeds(sft, 2), "0", "", ""]]
    for case in cases:
        found = [reports[seed][str(folders[case][seed])] for seed in seeds]
        figures = [over_seeds([each[name]["mean"] for each in found], 2) for name in ("gold", "kl")]
        ends = [margins(folder)[-1] for folder in folders[case]]
        figures += [over_seeds([pair[side] for pair in ends], 2) for side in (0, 1)]
        lines.append([*case, *figures])
    table(["loss", "labels", "gold", "KL to SFT", "held-out h", "h in training"], *lines)

    lines = []
    for case, seed in product(cases, seeds[:LONG_SEEDS]):
        found = margins(tuned(seed, *case, LONG_EPOCHS))
        cells = [f"{held_out:.2f}, {train:.2f}" for held_out, train in found]
        lines.append([*case, str(seed), *cells])
    table(["loss", "labels", "seed", *(f"epoch {i + 1}" for i in range(LONG_EPOCHS))], *lines)


def strengths(seeds: range) -> None:
    """The tie to the reference, at the first seed."""
    seed = seeds[0]
    folders = [tuned(seed, loss, "own", 1, strength) for loss, strength in SCANNED]
    report = judged_by_gold(seed, "gold_strengths", folders)
    lines = []
    for (loss, strength), folder in zip(SCANNED, folders, strict=True):
        found = report[str(folder)]
        figures = [
            f"{found[name]['mean']:.2f} ± {found[name]['stderr']:.2f}" for name in ("gold", "kl")
        ]
        lines.append([loss, strength, *figures, *(f"{h:.2f}" for h in margins(folder)[-1])])
    table(["loss", "tie", "gold", "KL to SFT", "held-out h", "h in training"], *lines)


def judged_by_gold(seed: int, out: str, folders: list[Path]) -> Row:
    """Gold and KL of policies and of SFT, on 4 responses to each of 100 held-out prompts."""
    baselines = ",".join(map(str, [*folders, f"runs/s{seed}/sft"]))
    words = [f"baselines=[{baselines}]", "reward=null", "algo.prompts=100", "algo.samples=4"]
    report = cli("evaluate", seed, out, *words)
    policies: Row = json.loads((report / "report.json").read_text())["policies"]
    return policies


def tuned(seed: int, loss: str, labels: str, epochs: int, strength: str = "") -> Path:
    """A policy trained on the demo's pairs; 125 steps of 32 pairs, or 64 responses, an epoch."""
    train = TRAIN if labels == "own" else with_flips()
    strength = strength or STRENGTHS[loss]
    out = f"{loss.lower()}_{strength.replace('=', '')}_{labels}_{epochs}"
    words = [*rows_of(train, HELD_OUT), *LOSSES[loss], f"algo.{strength}"]
    return cli("dpo", seed, out, *words, f"algo.epochs={epochs}", "algo.eval_every=125")


def with_flips() -> Path:
    """The demo's training pairs with a fifth of them the wrong way round, the same at each seed."""
    rng = random.Random("rlhf-cli flipped labels")
    rows = read(TRAIN)
    for row in rows:
        if rng.random() < FLIPPED:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write(Path("runs") / "flipped.jsonl", rows)


def margins(folder: Path) -> list[tuple[float, float]]:
    """(h on held-out pairs, mean h over the last 25 training batches) at the end of each epoch."""
    scale = json.loads((folder / "stage.json").read_text())["implicit_reward"]["beta"]
    log = read(folder / "metrics.jsonl")
    found = []
    for end, row in enumerate(log, 1):
        if "eval/rewards/margin" in row:
            train = statistics.mean(each["rewards/margin"] for each in log[end - 25 : end])
            found.append((row["eval/rewards/margin"] / scale, train / scale))
    return found


def main(seeds: range) -> None:
    """Run and print."""
    for seed in seeds:
        cli("sft", seed, "sft")
    for experiment in (kwise_or_pairs, more_pairs, two_rewards, strengths, flipped_labels):
        print(f"## {experiment.__name__}\n")
        experiment(seeds)


if __name__ == "__main__":
    os.chdir(sys.argv[2] if len(sys.argv) > 2 else ".")
    main(range(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
