"""Published results about learning from samples, on the demo and on a task in steps.

    python benchmarks/online.py PART... [--seeds 3] [--folder .] [--at-once 2]

Trains what a part needs at each seed under FOLDER/runs, through the console script and in one
thread each, prints the tables of benchmarks/online.md and draws its pictures beside it. Finished
stages are not run again. Every figure is a mean over seeds with its least and greatest.

    clips       clipped ratios, adaptive and fixed penalties on the KL to the old policy, neither
    kl_coefs    gold as the tie to the reference grows, with a weak reward model
    proxies     reward models of few and many pairs: what they say, and gold, as KL grows
    mixes       PPO with more and more plain text
    steps       rewards of steps against a reward of the last one
    baselines   RLOO with groups of 4 and of 2, and REINFORCE
    critics     PPO and GRPO on as many rollouts: gold and memory
    dynamic_sampling  groups of other prompts in place of those with equal rewards
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.reporting.plots import Curve, curve_panel, names_in, write_picture

HERE = Path(__file__).resolve()
PICTURES = HERE.with_suffix("")

Row = dict[str, Any]
Cases = dict[str, tuple[str, ...]]

# --------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Job:
    """One stage at one seed."""

    stage: str
    seed: int
    out: str
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path("runs") / f"s{self.seed}" / self.out

    def run(self) -> None:
        """Run it unless that is done; seconds and peak memory go into a file beside its folder."""
        if (self.folder / "stage.json").exists():
            return
        command = [
            "rlhf-cli",
            self.stage,
            f"name=s{self.seed}",
            f"seed={self.seed}",
            f"out={self.folder}",
        ]
        command += ["hardware.threads=1", *self.words]
        print(*command, file=sys.stderr, flush=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.log", "w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            _, child.returncode, usage = os.wait4(child.pid, 0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed: see {self.folder}.log")
        cost = {"seconds": usage.ru_utime + usage.ru_stime, "mib": usage.ru_maxrss / 1024}
        Path(f"{self.folder}.cost.json").write_text(json.dumps(cost))


@dataclass
class Bench:
    """What the command line says."""

    seeds: range
    at_once: int

    def run(self, jobs: Iterable[Job]) -> None:
        """Run jobs that do not need each other."""
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(Job.run, jobs))

    def run_cases(self, stage: str, part: str, cases: Cases, *words: str) -> dict[str, list[Path]]:
        """The folders of every case, one for each seed.

        SEED in a word stands for the seed's folder.
        """
        jobs = {
            case: [
                Job(
                    stage,
                    seed,
                    f"{part}/{slug(case)}",
                    tuple(w.replace("SEED", f"runs/s{seed}") for w in (*own, *words)),
                )
                for seed in self.seeds
            ]
            for case, own in cases.items()
        }
        self.run(jobs[case][i] for i in range(len(self.seeds)) for case in cases)
        return {case: [job.folder for job in each] for case, each in jobs.items()}

    def demo(self, *pairs: int) -> None:
        """The demo's SFT policy, and reward models of the first pairs."""
        self.run(Job("sft", seed, "sft", ()) for seed in self.seeds)
        self.run(
            Job(
                *("reward", seed, f"reward{count}"),
                (f"policy=runs/s{seed}/sft", f"data.max_rows={count}", "algo.eval_every=1000"),
            )
            for seed in self.seeds
            for count in pairs
        )


def slug(case: str) -> str:
    """The name of a case as a folder."""
    return re.sub(r"[^a-z0-9.]+", "_", case.lower()).strip("_")


def on_demo(reward: int, steps: int, every: int) -> tuple[str, ...]:
    """Words for a run from the demo's SFT with a reward model, gold on all held-out prompts."""
    return (
        "policy=SEED/sft",
        f"reward=SEED/reward{reward}",
        f"algo.steps={steps}",
        *watched(every, "demo_gold"),
    )


def watched(every: int, gold: str) -> tuple[str, ...]:
    """Words for evaluations on 200 held-out prompts."""
    return f"gold={gold}", f"algo.eval_every={every}", "algo.eval_prompts=200"


# --------------------------------------------------------------------------- reading


def rows_of(folder: Path) -> list[Row]:
    """What a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folders: Sequence[Path], name: str) -> list[float]:
    """A metric in the last iteration that has it, of each seed."""
    return [[row[name] for row in rows_of(folder) if name in row][-1] for folder in folders]


def mean(folders: Sequence[Path], name: str) -> list[float]:
    """A metric's mean over the iterations, of each seed."""
    return [statistics.mean(row[name] for row in rows_of(f) if name in row) for f in folders]


def of_stage(folders: Sequence[Path], name: str) -> list[float]:
    """A figure of the finished checkpoint, of each seed."""
    return [json.loads((f / "stage.json").read_text())["metrics"][name] for f in folders]


def cost(folders: Sequence[Path], name: str) -> list[float]:
    """Processor seconds, or peak MiB, of each seed."""
    return [json.loads(Path(f"{folder}.cost.json").read_text())[name] for folder in folders]


def watched_rows(folder: Path) -> list[Row]:
    """The iterations with an evaluation."""
    return [row for row in rows_of(folder) if "eval/kl" in row]


def curve(folders: Sequence[Path], name: str) -> list[float]:
    """A metric of the evaluations, mean over seeds."""
    each = [[row[name] for row in watched_rows(f)] for f in folders]
    return [statistics.mean(values) for values in zip(*each, strict=True)]


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean (least .. greatest)."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({low} .. {high})"


def table(*rows: Sequence[str]) -> None:
    """Print markdown; the first row is the header."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


class Picture:
    """Panels below each other, saved as a PNG beside the tables."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.panels: list[tuple[str, str, list[Curve]]] = []

    def panel(self, measured: str, across: str) -> list[Curve]:
        """The curves of one more panel, to be filled."""
        self.panels.append((measured, across, []))
        return self.panels[-1][2]

    def save(self) -> None:
        """The file; a name has one colour in all panels."""
        names = names_in({str(i): curves for i, (_, _, curves) in enumerate(self.panels)})
        PICTURES.mkdir(exist_ok=True)
        drawn = [curve_panel(*each, names) for each in self.panels]
        write_picture(PICTURES / f"{self.name}.png", drawn)


# --------------------------------------------------------------------------- PPO


def clips(bench: Bench) -> None:
    """Eight optimizer steps on each batch, four times as large as the demo's."""
    bench.demo(4000)
    cases: Cases = {"none": ("algo.clip=1e9",)}
    cases |= {f"clip {c}": (f"algo.clip={c}",) for c in (0.1, 0.2, 0.3)}
    klpen = "algo=ppo_klpen"
    cases |= {f"adaptive {d}": (klpen, f"algo.old_kl_target={d}") for d in (0.003, 0.01, 0.03)}
    cases["fixed 1"] = (klpen, "algo.old_kl_coef=1", "algo.old_kl_target=null")
    fast = ("algo.epochs=4", "algo.lr=1e-3", "algo.lr_schedule=constant")
    folders = bench.run_cases("ppo", "clips", cases, *on_demo(4000, 20, 10), *fast)
    lines = [
        [case]
        + [over_seeds(last(each, f"eval/{name}")) for name in ("gold", "reward", "kl")]
        + [over_seeds(mean(each, "old_kl_after" if klpen in cases[case] else "old_kl"), 4)]
        for case, each in folders.items()
    ]
    header = ["update", "gold", "reward model", "KL to SFT", "KL(old, new) per token, mean"]
    table(header, *lines)


def kl_coefs(bench: Bench) -> None:
    """PPO with the reward model of 250 pairs."""
    bench.demo(250)
    cases: Cases = {str(c): (f"algo.kl_coef={c}",) for c in (0, 0.01, 0.05, 0.2, 0.5, 2)}
    folders = bench.run_cases("ppo", "kl_coefs", cases, *on_demo(250, 40, 20))
    lines = [
        [case, *(over_seeds(last(each, f"eval/{name}")) for name in ("gold", "reward", "kl"))]
        for case, each in folders.items()
    ]
    table(["kl_coef", "gold", "reward model", "KL to SFT"], *lines)
    picture = Picture("kl_coefs")
    shown = picture.panel("gold, held-out prompts", f"place in kl_coef {', '.join(folders)}")
    places = range(1, len(folders) + 1)
    for i in range(len(bench.seeds)):
        golds = [last(each, "eval/gold")[i] for each in folders.values()]
        shown.append(Curve(f"seed {bench.seeds[i]}", places, golds, dashed=True))
    golds = [statistics.mean(last(each, "eval/gold")) for each in folders.values()]
    shown.append(Curve("mean", places, golds))
    picture.save()


def proxies(bench: Bench) -> None:
    """No tie to the reference, a constant rate, and reward models of more and more pairs."""
    sizes = (60, 250, 1000)
    bench.demo(*sizes)
    free = ("algo.kl_coef=0", "algo.lr_schedule=constant")
    folders: dict[str, list[Path]] = {}
    for size in sizes:
        words = (*on_demo(size, 80, 4), *free)
        folders |= bench.run_cases("ppo", "proxies", {f"{size} pairs": ()}, *words)
    lines: list[list[str]] = []
    picture = Picture("proxies")
    across = "sqrt(KL to SFT), nats per response"
    panels = [
        picture.panel(f"{name}, held-out prompts", across) for name in ("reward model", "gold")
    ]
    shown = ("reward", "gold", "kl")
    for case, each in folders.items():
        peaks = [max(watched_rows(folder), key=lambda row: row["eval/gold"]) for folder in each]
        lines.append(
            [case.split()[0]]
            + [over_seeds([peak[f"eval/{name}"] for peak in peaks]) for name in shown]
            + [over_seeds(last(each, f"eval/{name}")) for name in shown]
        )
        reward, gold, kl = (curve(each, f"eval/{name}") for name in shown)
        roots = [max(value, 0.0) ** 0.5 for value in kl]
        for curves, values in zip(panels, (reward, gold), strict=True):
            curves.append(Curve(case, roots, values))
    header = ["pairs", "reward model at the peak of gold", "gold there", "KL there"]
    header += ["reward model after 80 iterations", "gold then", "KL then"]
    table(header, *lines)
    picture.save()


def mixes(bench: Bench) -> None:
    """Held-out loss on the demo's plain text, which SFT has seen some of."""
    bench.demo(4000)
    cases: Cases = {str(c): (f"algo.ptx_coef={c}",) for c in (0, 0.1, 1, 5)}
    words = (*on_demo(4000, 30, 30), "algo.lr=1e-3")
    folders = bench.run_cases("ppo", "mixes", cases, *words)
    sft = of_stage([Path(f"runs/s{seed}/sft") for seed in bench.seeds], "text/loss")
    lines = [["SFT", over_seeds(sft, 3), "", ""]]
    lines += [
        [case, over_seeds(of_stage(each, "text/loss"), 3)]
        + [over_seeds(last(each, f"eval/{name}")) for name in ("gold", "kl")]
        for case, each in folders.items()
    ]
    table(["ptx_coef", "held-out text loss, nats per token", "gold", "KL to SFT"], *lines)


# --------------------------------------------------------------------------- a task in steps

NUMBERS, WRONG, CHAINS = 7, 0.3, (4000, 200)


def chain_rows() -> None:
    """The largest number so far, in demonstrations whose steps are often wrong.

    A wrong step is any other digit, and the next one goes on from it.
    """
    rng = random.Random("rlhf-cli largest so far")
    for side, count in zip(("train", "eval"), CHAINS, strict=True):
        lines: list[str] = []
        for _ in range(count):
            numbers = [rng.randrange(10) for _ in range(NUMBERS)]
            said = [numbers[0]]
            for number in numbers[1:]:
                right = max(said[-1], number)
                wrong = (right + rng.randrange(1, 10)) % 10
                said.append(wrong if rng.random() < WRONG else right)
            row = {"prompt": " ".join(map(str, numbers)), "completion": written(said[1:])}
            answer = written([max(numbers[: i + 1]) for i in range(1, NUMBERS)])
            lines.append(json.dumps(row | {"answer": answer}) + "\n")
        Path(f"chains.{side}.jsonl").write_text("".join(lines))


def written(steps: Sequence[int]) -> str:
    """7. 7. 9."""
    return " ".join(f"{step}." for step in steps)


def last_step(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """A reward function: 1 where the last of the right number of steps is right."""
    pairs = zip((text.split() for text in responses), map(str.split, answer), strict=True)
    return [float(len(said) == len(right) and said[-1] == right[-1]) for said, right in pairs]


def each_step(prompts: list[str], steps: list[list[str]], answer: list[str]) -> list[list[float]]:
    """A step verifier: 1 where a step is right, but for a last one that comes too early."""
    found = []
    for said, right in zip(steps, map(str.split, answer), strict=True):
        values = [float(a.strip() == b) for a, b in zip(said, right, strict=False)]
        values += [0.0] * (len(said) - len(values))
        if len(said) < len(right):
            values[-1] = 0.0
        found.append(values)
    return found


def all_steps(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where every step is right: what both rewards are judged by."""
    return [
        float(said.split() == right.split()) for said, right in zip(responses, answer, strict=True)
    ]


def on_chains(steps: int, every: int) -> tuple[str, ...]:
    """Words for grpo on that task."""
    return (
        *chain_data(),
        "policy=SEED/chains",
        f"algo.steps={steps}",
        "algo.lr_schedule=constant",
        *watched(every, f"{HERE}:all_steps"),
    )


def chain_data() -> tuple[str, ...]:
    """Words for the rows of that task."""
    return (
        "data=jsonl",
        "data.path=chains.train.jsonl",
        "data.eval_path=chains.eval.jsonl",
        'data.template="{prompt} = "',
        'data.step_end="(?<=[.]) "',
        "data.max_prompt_tokens=32",
        "data.max_response_tokens=24",
    )


def chain_policy(bench: Bench) -> None:
    """The policy that learned from careless demonstrations."""
    chain_rows()
    bench.run(Job("sft", seed, "chains", chain_data()) for seed in bench.seeds)


def steps(bench: Bench) -> None:
    """GRPO, both ways, on as many rollouts."""
    chain_policy(bench)
    cases: Cases = {
        "outcome": ("algo=grpo", f"reward={HERE}:last_step"),
        "process": ("algo=grpo_process", f"reward={HERE}:each_step"),
    }
    folders = bench.run_cases("grpo", "steps", cases, *on_chains(60, 10))
    curves = {case: curve(each, "eval/gold") for case, each in folders.items()}
    table(
        ["rewarded", *(f"after {10 * (i + 1)}" for i in range(6))],
        *(
            [
                case,
                *(
                    over_seeds([rows_of(f)[10 * i + 9]["eval/gold"] for f in each])
                    for i in range(6)
                ),
            ]
            for case, each in folders.items()
        ),
    )
    picture = Picture("steps")
    shown = picture.panel("all steps right, held-out prompts", "iterations")
    for case, values in curves.items():
        shown.append(Curve(case, [10 * (i + 1) for i in range(6)], values))
    picture.save()


def dynamic_sampling(bench: Bench) -> None:
    """DAPO without its penalty of long responses, groups of 4, a reward of 0 or 1."""
    chain_policy(bench)
    shared = (
        *("algo=dapo", "algo.overlong_tokens=null", "algo.group_size=4"),
        *(f"reward={HERE}:all_steps", *on_chains(60, 5)),
    )
    cases: Cases = {str(count): (f"algo.dynamic_sampling={count}",) for count in (0, 3)}
    folders = bench.run_cases("grpo", "dynamic_sampling", cases, *shared)
    picture = Picture("dynamic_sampling")
    panels = [
        picture.panel("all steps right, held-out prompts", each)
        for each in ("iterations", "rollouts")
    ]
    lines: list[list[str]] = []
    for case, each in folders.items():
        evals, sampled = curve(each, "eval/gold"), groups_so_far(each)
        lines.append(
            [
                case,
                over_seeds(mean(each, "equal_groups")),
                over_seeds([statistics.mean(learnt(row) for row in rows_of(f)) for f in each], 1),
                f"{sampled[-1] * 4:.0f}",
                *(over_seeds([rows_of(f)[i - 1]["eval/gold"] for f in each]) for i in (20, 40, 60)),
            ]
        )
        xs = [5 * (i + 1) for i in range(len(evals))]
        for curves, across in zip(panels, (xs, [4 * each for each in sampled]), strict=True):
            curves.append(Curve(f"{case} rounds", across, evals))
    header = ["rounds", "equal groups", "groups learnt from, of 16", "rollouts in all"]
    table([*header, *(f"right after {i}" for i in (20, 40, 60))], *lines)
    picture.save()


def learnt(row: Row) -> float:
    """Groups of an iteration that have a gradient."""
    return float(row.get("learnt_groups", 16 * (1 - row["equal_groups"])))


def groups_so_far(folders: Sequence[Path]) -> list[float]:
    """Groups sampled up to each evaluation, mean over seeds."""
    each = []
    for folder in folders:
        total, found = 0.0, []
        for row in rows_of(folder):
            total += row.get("sampled_groups", 16)
            if "eval/kl" in row:
                found.append(total)
        each.append(found)
    return [statistics.mean(values) for values in zip(*each, strict=True)]


# --------------------------------------------------------------------------- baselines


def baselines(bench: Bench) -> None:
    """64 rollouts and one optimizer step an iteration."""
    bench.demo(4000)
    same = ("algo.lr=5e-4", "algo.adam_eps=1e-8", "algo.missing_eos_reward=-3", "algo.kl_coef=0.05")
    words = (*on_demo(4000, 30, 10), *same)
    rloo: Cases = {
        f"RLOO, groups of {k}": (
            "algo=rloo",
            f"algo.group_size={k}",
            f"algo.batch_size={64 // k}",
            f"algo.minibatch_size={64 // k}",
        )
        for k in (4, 2)
    }
    alone: Cases = {
        "REINFORCE, mean of the batch": ("algo=reinforce",),
        "REINFORCE, no baseline": (
            *("algo=reinforce", "algo.baseline=none"),
            "algo.normalise_advantages=none",
        ),
    }
    folders = bench.run_cases("grpo", "baselines", rloo, *words)
    folders |= bench.run_cases("ppo", "baselines", alone, *words)
    lines = [
        [case]
        + [over_seeds([rows_of(f)[i - 1]["eval/gold"] for f in each]) for i in (10, 20, 30)]
        + [over_seeds(last(each, f"eval/{name}")) for name in ("reward", "kl")]
        for case, each in folders.items()
    ]
    header = ["algorithm", *(f"gold after {i}" for i in (10, 20, 30))]
    table([*header, "reward model", "KL to SFT"], *lines)


def critics(bench: Bench) -> None:
    """64 rollouts and four optimizer steps an iteration, the same learning rate."""
    bench.demo(4000)
    same = ("algo.lr=3e-4", "algo.adam_eps=1e-8", "algo.missing_eos_reward=-3", "algo.epochs=2")
    words = (*on_demo(4000, 30, 10), *same)
    ppo: Cases = {"PPO": ("algo=ppo",)}
    grpo: Cases = {
        "GRPO, groups of 8": ("algo=grpo", "algo.batch_size=8", "algo.minibatch_size=4"),
    }
    folders = bench.run_cases("ppo", "critics", ppo, *words)
    folders |= bench.run_cases("grpo", "critics", grpo, *words)
    lines = [
        [case]
        + [over_seeds(last(each, f"eval/{name}")) for name in ("gold", "reward", "kl")]
        + [over_seeds(cost(each, name), 0) for name in ("seconds", "mib")]
        for case, each in folders.items()
    ]
    header = ["algorithm", "gold", "reward model", "KL to SFT", "processor seconds", "peak MiB"]
    table(header, *lines)


PARTS = (clips, kl_coefs, proxies, mixes, steps, baselines, critics, dynamic_sampling)


def main() -> None:
    """Run and print."""
    names = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *names], metavar="PART")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--at-once", type=int, default=2)
    words = parser.parse_args()
    os.chdir(words.folder)
    for name in words.parts or names:
        print(f"## {name}\n")
        names[name](Bench(range(words.seeds), words.at_once))


if __name__ == "__main__":
    main()
