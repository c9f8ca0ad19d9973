"""Several ranks: what a step takes here on one and two, and arithmetic for what is not here.

    python benchmarks/scale.py measure [FOLDER] [--rounds 5] [--steps 6] [--lines FILE]
    python benchmarks/scale.py arithmetic

`measure` runs `sft` on a CPU in one process and in two, whole and sharded, a thread each, in turns:
each round has one run of each, and what is told is the median of rounds. A step is timed from
Optimizer.step to its end, the first one left out: by the clock, which a busy machine makes useless,
and by the processor time of the rank, of all its threads, which waits for nobody; `peak` is the
most that was resident at once (VmHWM) less what was once the libraries were imported, of the rank
that had most. Linux with glibc only.

`arithmetic` prints what a step would take of a 7B on one machine of 8 GPUs and of a 70B on eight of
them: bytes of each rank, bytes that it sends and receives, and the share of a step that computing
has. Nothing of it is measured.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from rlhf_cli.folders.geometry import Geometry
from rlhf_cli.runs.model_sizes import BYTES
from rlhf_cli.runs.pass_sizes import activations

GB, GIB, MIB = 1e9, 2**30, 2**20

# --------------------------------------------------------------------------- arithmetic

NARROW = 2  # bytes of a number in bfloat16


@dataclass(frozen=True)
class Model:
    """A decoder as Llama's, whose unembedding is not tied.

    keys: width of the keys of all heads, and of the values.
    """

    name: str
    layers: int
    width: int
    keys: int
    inner: int
    vocabulary: int

    @property
    def block(self) -> int:
        """Numbers of a block."""
        attention = 2 * self.width * (self.width + self.keys)
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def rest(self) -> int:
        """Numbers beside the blocks."""
        return 2 * self.width * self.vocabulary + self.width

    @property
    def numbers(self) -> int:
        """All of them."""
        return self.layers * self.block + self.rest


@dataclass(frozen=True)
class Cluster:
    """Machines with GPUs. What a data sheet says of one of them, in bytes and operations a second.

    inside, between: what a GPU sends, and receives as well, to the others of its machine, and by
        the network card that it has for itself.
    """

    machines: int
    gpus: int
    memory: float = 80 * GB
    operations: float = 989e12
    inside: float = 450 * GB
    between: float = 50 * GB

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.machines * self.gpus

    def rate(self, link: str) -> float:
        """Bytes a second of a rank: inside a machine, across all of them, or between GPUs that have
        one place on different ones.

        What goes across leaves a machine by all of its cards: as many rings, each with its part.
        """
        across = min(self.inside, self.gpus * self.between)
        return {"inside": self.inside, "across": across, "between": self.between}[link]


@dataclass(frozen=True)
class Step:
    """An update: tokens of each rank, in so many micro-batches, and whether backward computes the
    blocks again.
    """

    tokens: int
    micro_batches: int
    again: bool


ACHIEVED = 0.4  # of a GPU's operations, while it computes; assumed, as is the next one
CARRIED = 0.75  # of what links can do
CASES = [
    (
        Model("Llama 2 7B", 32, 4096, 4096, 11008, 32000),
        Cluster(1, 8),
        Step(32768, 4, False),
    ),
    (
        Model("Llama 3 70B", 80, 8192, 1024, 28672, 128256),
        Cluster(8, 8),
        Step(32768, 4, True),
    ),
]


def parts(shard: str, cluster: Cluster) -> int:
    """Into how many parts weights are cut."""
    return {"none": 1, "hybrid": cluster.gpus, "full": cluster.ranks}[shard]


def held(model: Model, shard: str, cluster: Cluster, step: Step) -> dict[str, float]:
    """Bytes of a rank by part, in bfloat16 with all weights trained: as `--check` counts them."""
    count, cut = model.numbers, parts(shard, cluster)
    geometry = Geometry(
        *(model.layers, model.width, model.keys, model.inner, model.vocabulary),
        *(model.width // 128, model.layers, False),
    )
    cfg = SimpleNamespace(model=SimpleNamespace(frozen_layers=0))
    tokens = step.tokens // step.micro_batches
    found = {
        "weights": NARROW * count + BYTES * count if cut == 1 else BYTES * count / cut,
        "gradients": BYTES * count / cut,
        "moments": 2 * BYTES * count / cut,
        "activations": activations(cfg, geometry, tokens, NARROW, float(step.again)),
        "gathered": 0.0,
    }
    if cut > 1:
        largest = max(model.rest, model.block)
        found["gathered"] = NARROW * (model.rest + 2.0 * model.block)
        found["gathered"] += (NARROW + BYTES) * largest
    return found


def sent(model: Model, shard: str, cluster: Cluster, step: Step) -> dict[str, float]:
    """Bytes that a rank sends in a step, and receives as well, by operation and link.

    Rings: a gather or a reduce-scatter of n bytes over P ranks sends n (P - 1) / P, an all-reduce
    twice that. Weights are gathered in bfloat16 for the forward and for the backward pass of each
    micro-batch, and its gradients are reduced in float32; whole ones once, after the last.
    """
    count, ranks, times = model.numbers, cluster.ranks, step.micro_batches
    over = "inside" if cluster.machines == 1 else "across"
    if shard == "none":
        return {f"all-reduce, {over}": 2 * BYTES * count * (ranks - 1) / ranks}
    cut = parts(shard, cluster)
    link = "inside" if shard == "hybrid" else over
    share = (cut - 1) / cut
    found = {
        f"all-gather, {link}": 2 * times * NARROW * count * share,
        f"reduce-scatter, {link}": times * BYTES * count * share,
    }
    if shard == "hybrid":
        apart = (cluster.machines - 1) / cluster.machines
        found["all-reduce, between"] = 2 * times * BYTES * count / cut * apart
    return found


def seconds(model: Model, shard: str, cluster: Cluster, step: Step) -> tuple[float, float]:
    """What computing and sending take in a step: 6 operations a weight and token, 8 if blocks are
    computed again. Attention between tokens is left out.
    """
    work = (8 if step.again else 6) * model.numbers * step.tokens
    sending = sum(
        size / (CARRIED * cluster.rate(name.rpartition(" ")[2]))
        for name, size in sent(model, shard, cluster, step).items()
    )
    return work / (ACHIEVED * cluster.operations), sending


def ways(cluster: Cluster) -> list[str]:
    """Ways to shard that differ."""
    return ["none", "full"] if cluster.machines == 1 else ["none", "hybrid", "full"]


def arithmetic() -> Iterator[str]:
    """The tables, line by line."""
    for model, cluster, step in CASES:
        again = "blocks computed again" if step.again else "nothing computed again"
        yield (
            f"{model.name} ({model.numbers / 1e9:.2f}B) on {cluster.machines} x {cluster.gpus} "
            f"H100 of 80 GB; {step.tokens:,} tokens of each rank in a step, "
            f"{step.micro_batches} micro-batches, {again}:"
        )
        yield ""
        yield (
            "| shard | weights | gradients | moments | activations | gathered | sum | of 80 GB |"
        )
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
        for shard in ways(cluster):
            bytes_of = held(model, shard, cluster, step)
            total = sum(bytes_of.values())
            cells = " | ".join(f"{size / GB:.1f}" for size in (*bytes_of.values(), total))
            fits = "fits" if total < 0.9 * cluster.memory else "too much"
            yield f"| {shard} | {cells} | {fits} |"
        yield ""
        yield "| shard | sent by a rank, GB | compute, s | sending, s | share of compute |"
        yield "| --- | --- | ---: | ---: | ---: |"
        for shard in ways(cluster):
            computing, sending = seconds(model, shard, cluster, step)
            told = "; ".join(
                f"{name} {size / GB:.1f}"
                for name, size in sent(model, shard, cluster, step).items()
            )
            least = computing / (computing + sending)
            most = least if shard == "none" else computing / max(computing, sending)
            share = f"{least:.0%}" if shard == "none" else f"{least:.0%} to {most:.0%}"
            yield f"| {shard} | {told} | {computing:.2f} | {sending:.2f} | {share} |"
        yield ""


# --------------------------------------------------------------------------- measured

WORDS = [
    *("sft", "data=jsonl", "data.path=demonstrations.jsonl", "data.eval_rows=8"),
    *("data.max_prompt_tokens=384", "data.max_response_tokens=128", "model=pretrained"),
    *("model.path=model", "model.dtype=float32", "algo.batch_size=8", "algo.warmup_steps=0"),
    *("algo.lr=1e-5", "algo.eval_every=1000", "algo.keep=last", "hardware=cpu"),
    *("hardware.threads=1", "hardware.save_every=null", "hardware.compile=false"),
    *("hardware.tokens_per_microbatch=1024", "overwrite=true"),
]
KINDS = {"1 process": (1, "none"), "2 ranks, whole": (2, "none"), "2 ranks, sharded": (2, "full")}


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def be_rank(file: str, words: list[str]) -> None:
    """Run a stage as the environment says, and leave its times and its peak in a file."""
    import rlhf_cli.stages.sft  # noqa: F401  (what it imports is no memory of the run)
    from rlhf_cli.cli import main
    from rlhf_cli.training.optimize import Optimizer

    start, times, step = resident("VmRSS"), [], Optimizer.step

    def timed(*args: object) -> object:
        began = time.perf_counter(), time.process_time()
        done = step(*args)  # type: ignore[arg-type]
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return done

    Optimizer.step = timed  # type: ignore[assignment, method-assign]
    sys.argv = ["rlhf-cli", *words]
    status = main()
    found = {"times": times[1:], "peak": resident("VmHWM") - start}
    Path(file).write_text(json.dumps(found))
    sys.exit(status)


def one_run(folder: Path, size: int, shard: str, steps: int) -> dict[str, float]:
    """A run of so many ranks: seconds of a step by the clock and of the busiest rank's processor,
    the medians, and the peak of the largest rank.
    """
    words = [*WORDS, f"algo.max_steps={steps}", f"hardware.shard={shard}", "out=out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        told = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
        if size > 1:
            told |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            told |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
            told |= {"MASTER_PORT": str(port)}
        command = [sys.executable, str(Path(__file__).resolve()), "rank", f"{rank}.json", *words]
        started.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **told},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if rank else None,
            )
        )
    statuses = [each.wait() for each in started]
    if any(statuses):
        raise SystemExit(f"{size} ranks, shard={shard}: failed")
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return {
        "step": statistics.median(wall for wall, _ in found[0]["times"]),
        "work": max(statistics.median(own for _, own in each["times"]) for each in found),
        "peak": max(each["peak"] for each in found),
    }


def measure(folder: Path, rounds: int, steps: int, lines: str | None) -> None:
    """Runs of each kind in turns, and the table of their medians."""
    import speed_inputs

    speed_inputs.prepare(folder, speed_inputs.Shape(384, 1024, 8, 6, 2, 8000))
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, (size, shard) in KINDS.items():
            found = one_run(folder, size, shard, steps)
            runs[kind].append(found)
            line = {"round": number, "kind": kind, **found, "load": os.getloadavg()[0]}
            print(json.dumps(line), file=sys.stderr, flush=True)
            if lines is not None:
                with Path(lines).open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print("| ranks | seconds by the clock | processor seconds | ratio | peak of a rank, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    alone = runs["1 process"]
    for kind, each in runs.items():
        step, work, peak = (
            statistics.median(run[name] for run in each) for name in ("step", "work", "peak")
        )
        spread = f"{min(run['step'] for run in each):.1f} to {max(run['step'] for run in each):.1f}"
        ratio = statistics.median(
            run["work"] / other["work"] for run, other in zip(each, alone, strict=True)
        )
        print(f"| {kind} | {step:.1f} ({spread}) | {work:.2f} | {ratio:.2f} | {peak:.0f} |")


def main() -> None:
    """What the first word asks for."""
    if sys.argv[1:2] == ["rank"]:
        be_rank(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("measure", "arithmetic"))
    parser.add_argument("folder", nargs="?", help="where inputs are made; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lines", help="a file for a JSON line of each run")
    options = parser.parse_args()
    if options.what == "arithmetic":
        print(*arithmetic(), sep="\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(
            Path(options.folder or temporary).resolve(),
            *(options.rounds, options.steps, options.lines),
        )


if __name__ == "__main__":
    main()
