"""Time our jobs beside the same jobs of TRL and transformers, on a GPU if there is one.

    python benchmarks/speed.py [JOB ...] [--side SIDE] [--repeat N] [--lines FILE] [key=value ...]

Every run is a process of its own, the sides take turns, and each run prints a JSON line at once:
seconds of a step (median, least, greatest), processor time of a step, tokens per second, peak
memory (of the GPU, else resident), seconds from the start of the process to the end of the first
step, seconds by phase, and how near the run came to what the machine did just before:
`flop_share` is operations over those of matrix products, `bandwidth_share` bytes of weights and
cache over those of a copy. At the end comes a table of ours over each peer; `processor` there is
tokens per second of processor time, which other work on the machine changes least. Other words
are overrides for our side.

    jobs    sft dpo gen grpo sft16k ppo reward ragged; all of them unless some are named
    sides   ours; trl (float32 weights under bfloat16 on a GPU), trl16 (weights in bfloat16),
            hf (generate)

A peer that is not installed, or has no such job, is said to be skipped. benchmarks/speed.md has
figures and says how they came about.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from speed_inputs import SHAPES

HERE = Path(__file__).resolve().parent
Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is timed: a stage or sampling, rows of a step, and prompts, group and length."""

    stage: str
    batch: int
    sampling: tuple[int, int, int]
    steps: int
    warm_up: int = 2
    peer_parts: int = 1  # micro-batches of TRL's grpo, whose logits do not fit at once


def jobs_of(gpu: bool) -> dict[str, Job]:
    """The jobs by name, of a size for the machine."""
    rows, pairs, sampling = (32, 32, (16, 8, 256)) if gpu else (16, 8, (8, 8, 64))
    training = Job("sft", rows, sampling, 14 if gpu else 12)
    online = replace(training, stage="grpo", steps=4, peer_parts=8 if gpu else 1)
    samples = Job("gen", rows, sampling, 4, warm_up=1)
    return {  # the more telling ones first, for a time limit may leave out the rest
        "sft": training,
        "dpo": replace(training, stage="dpo", batch=pairs),
        "gen": samples,
        "grpo": online,
        "sft16k": replace(training, batch=100, steps=9),
        "ppo": replace(online, stage="ppo"),
        "reward": replace(training, stage="reward", batch=pairs),
        "ragged": replace(samples, stage="ragged"),
    }


SIDES = ("ours", "trl", "trl16", "hf")
PEERS = {"trl": ("sft", "dpo", "reward", "grpo"), "hf": ("gen", "ragged")}
JOBS = tuple(jobs_of(gpu=True))


# --------------------------------------------------------------------------- one run


def run(spec: Line, limit: float) -> Line:
    """What the process of a side prints; where it fails, `failed` says how."""
    command = [sys.executable, str(HERE / "speed_jobs.py")]
    environment = os.environ | {"PYTHONPATH": paths(), "PYTHONUNBUFFERED": "1"}
    log = Path(spec["folder"], "last.log")
    with log.open("w+") as said:
        try:
            done = subprocess.run(
                [*command, json.dumps(spec | {"launched": time.time()})],
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"over {limit:.0f} s"}
    lines = [each for each in done.stdout.splitlines() if each.startswith('{"')]
    if done.returncode == 0 and lines:
        result: Line = json.loads(lines[-1])
        return result
    last = (log.read_text().strip().splitlines() or [f"status {done.returncode}"])[-1]
    return {"failed": last[-300:]}


def paths() -> str:
    """PYTHONPATH with this checkout first."""
    return os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def measured(result: Line, ceiling: Line) -> Line:
    """A run's line for readers."""
    if "failed" in result:
        return result
    steps, processor = result.pop("steps"), result.pop("processor")
    median = statistics.median(steps)
    line: Line = {
        "step_s": round(median, 4),
        "least_s": round(min(steps), 4),
        "most_s": round(max(steps), 4),
        "n": len(steps),
        "processor_s": round(statistics.median(processor), 4),
    }

    def rate(amounts: list[float], times: list[float] = steps) -> float:
        return statistics.median(each / own for each, own in zip(amounts, times, strict=True))

    line["tokens_per_s"] = round(rate(result["tokens"]), 1)
    line["tokens_per_processor_s"] = round(rate(result["tokens"], processor), 1)
    result["tokens"] = round(statistics.fmean(result["tokens"]))
    if "operations" in result:
        share = rate(result.pop("operations")) / ceiling["operations_per_s"]
        line["flop_share"] = round(share, 4)
    if "bytes" in result:
        line["bandwidth_share"] = round(rate(result.pop("bytes")) / ceiling["bytes_per_s"], 4)
    line["peak_gib"] = round(result.pop("peak_gib"), 2)
    line["first_step_s"] = round(result.pop("first_step_s"), 1)
    return line | result


def runs(arguments: argparse.Namespace, jobs: dict[str, Job], ceiling: Line) -> Iterator[Line]:
    """The line of every run, as it ends; sides take turns."""
    ends = time.monotonic() + arguments.budget
    sizes = {"steps": arguments.steps, "batch": arguments.batch, "sampling": arguments.sampling}
    given = {name: value for name, value in sizes.items() if value is not None}
    for name in arguments.jobs or JOBS:
        job = replace(jobs[name], **given)
        sides = [side for side in arguments.side if side == "ours" or job.stage in PEERS[side[:3]]]
        for _ in range(arguments.repeat):
            for side in sides:
                start = {"job": name, "side": side, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
                left = ends - time.monotonic()
                if left < 5:
                    yield start | {"skipped": "no time is left"}
                    continue
                words = arguments.overrides if side == "ours" else []
                spec = {"job": job.stage, "side": side, "folder": str(arguments.folder)}
                spec |= {"overrides": words, "kernels": arguments.kernels, **vars(job)}
                del spec["stage"]
                result = measured(run(spec, min(arguments.limit, left)), ceiling)
                yield start | {"overrides": words} | result


# --------------------------------------------------------------------------- what is shown


def table(lines: Sequence[Line]) -> str:
    """Ours over each peer, as Markdown; the speed is of tokens per second, medians over runs."""
    rows = [
        "| job | side | tokens/s | least to most | step, s | peak, GiB | first step, s | "
        "FLOP share | bandwidth share | ours / peer: speed | processor | memory |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    good = [line for line in lines if "step_s" in line]
    for job in dict.fromkeys(line["job"] for line in good):
        found = {side: [x for x in good if (x["job"], x["side"]) == (job, side)] for side in SIDES}
        for side, own in found.items():
            if not own:
                continue
            speeds = [line["tokens_per_s"] for line in own]
            cells = [job, side, f"{statistics.median(speeds):,.0f}"]
            cells.append(f"{min(speeds):,.0f} to {max(speeds):,.0f}")
            for key in ("step_s", "peak_gib", "first_step_s", "flop_share", "bandwidth_share"):
                known = [line[key] for line in own if key in line]
                cells.append(f"{statistics.median(known):.3g}" if known else "")
            ratios = [""] * 3
            if side != "ours" and found["ours"]:
                ratios = [
                    f"{middle(found['ours'], of) / middle(own, of):.2f}"
                    for of in map(
                        itemgetter, ("tokens_per_s", "tokens_per_processor_s", "peak_gib")
                    )
                ]
            rows.append(f"| {' | '.join([*cells, *ratios])} |")
    return "\n".join(rows)


def middle(lines: Sequence[Line], of: Callable[[Line], float]) -> float:
    """The median of a figure."""
    return statistics.median(map(of, lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="JOB_OR_OVERRIDE")
    parser.add_argument("--side", action="append", choices=SIDES)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side")
    parser.add_argument("--limit", type=float, default=600, help="seconds of one run")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds of all runs")
    parser.add_argument("--lines", type=Path, help="file that the JSON lines go to as well")
    parser.add_argument("--folder", type=Path, help="where model and rows are made and kept")
    parser.add_argument("--shape", choices=SHAPES, help="of the model; by default one that fits")
    parser.add_argument("--rows", type=Path, help="HH's JSON lines; else made-up rows")
    parser.add_argument("--steps", type=int, help="of each run, with warm-up")
    parser.add_argument("--batch", type=int, help="rows or pairs of a step")
    parser.add_argument(
        "--kernels", action="store_true", help="of the last step, untimed: kernels and calls"
    )
    parser.add_argument("--sampling", type=sizes, help="prompts,group,length")
    arguments = parser.parse_intermixed_args()
    arguments.jobs = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word]
    if unknown := set(arguments.jobs) - set(JOBS):
        parser.error(f"no such job: {', '.join(sorted(unknown))}")
    arguments.side = list(dict.fromkeys(arguments.side or ("ours", "trl", "hf")))
    if importlib.util.find_spec("trl") is None:
        for side in [side for side in arguments.side if side.startswith("trl")]:
            print(f"{side} is skipped: trl is not installed (the extra peers)", file=sys.stderr)
            arguments.side.remove(side)

    first = arguments.folder or Path("/tmp/rlhf-cli-speed")
    first.mkdir(parents=True, exist_ok=True)
    ceiling = run({"side": "ceilings", "folder": str(first)}, 120)
    lines: list[Line] = []

    def show(line: Line) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if arguments.lines is not None:
            with arguments.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")

    show({"job": "ceilings"} | ceiling)
    if "failed" in ceiling:
        sys.exit(1)
    gpu = ceiling["device"] != "cpu"
    shape = arguments.shape or ("qwen2.5-0.5b" if gpu else "3m")
    arguments.folder = first / shape
    inputs = [str(HERE / "speed_inputs.py"), str(arguments.folder), shape]
    inputs += [] if arguments.rows is None else [str(arguments.rows)]
    subprocess.run([sys.executable, *inputs], check=True)
    for line in runs(arguments, jobs_of(gpu), ceiling):
        show(line)
    print(table(lines))


def sizes(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
