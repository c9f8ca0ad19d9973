"""Does memory grow when a stage runs again and again in one process?

    python benchmarks/soak.py [--times 20] [--stages sft reward ...] [--limit 2048] [--folder DIR]

Runs the demo chain stage by stage, each stage in one process that runs it so many times over, with
its data (heap and private mappings, RLIMIT_DATA) limited to so many MiB. After each run the garbage
is collected and the resident set is read; the outputs must be the same bytes each time. Prints a
table, and fails where the last run leaves more than the third did, NOISE aside. Linux only.
"""

import argparse
import ctypes
import gc
import hashlib
import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import compose

CHAIN: dict[str, list[str]] = {
    "sft": [],
    "reward": [],
    "ppo": ["algo=ppo_ptx"],
    "dpo": [],
    "grpo": [],
    "generate": [],
    "evaluate": [],
}
SETTLED = 3  # the run after which nothing new is imported, compiled or cached
NOISE = 1.02
MIB = 2**20


def repeat(stage: str, times: int, limit: int) -> dict[str, Any]:
    """Run a stage so many times in this process; what was resident after each run, in MiB."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit * MIB, limit * MIB))
    run = importlib.import_module(f"rlhf_cli.stages.{stage}").run
    resident, digests = [], set()
    began = time.monotonic()
    for _ in range(times):
        out = run(compose(stage, [*CHAIN[stage], "overwrite=true"]))
        digests.add(digest(out))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept by the allocator is no leak
        resident.append(status("VmRSS"))
        print(f"{stage}: {resident[-1]:.1f} MiB", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    return {
        "resident": resident,
        "peak": status("VmHWM"),
        "data": status("VmData"),
        "outputs": len(digests),
        "seconds": seconds / times,
    }


def digest(out: Path) -> str:
    """SHA-256 over what a stage made, its logs and their hashes aside, which have times."""
    timed = ("stage.json", "metrics.jsonl", "config.yaml")
    found = hashlib.sha256()
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name not in timed:
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def status(name: str) -> float:
    """A size that Linux keeps of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def main() -> int:
    """Soak every stage and print the table; 1 where memory grew or outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=CHAIN, default=list(CHAIN))
    parser.add_argument("--limit", type=int, default=2048, help="MiB of data")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.times < SETTLED:
        parser.error(f"--times: {SETTLED} are the least that tell anything")
    if given.child:
        (stage,) = given.stages
        print(json.dumps(repeat(stage, given.times, given.limit)))
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    words = ["--child", "--times", str(given.times), "--limit", str(given.limit), "--stages"]
    bad = False
    print("| stage | first | third | last | last / third | peak | data | outputs | seconds a run |")
    print("|---|---|---|---|---|---|---|---|---|")
    for stage in given.stages:
        own = [sys.executable, str(Path(__file__).resolve()), *words, stage]
        done = subprocess.run(own, cwd=given.folder, check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout)
        resident = found["resident"]
        first, third, last = resident[0], resident[SETTLED - 1], resident[-1]
        bad = bad or last > NOISE * third or found["outputs"] > 1
        sizes = " | ".join(f"{size:.0f}" for size in (first, third, last))
        print(
            f"| {stage} | {sizes} | {last / third:.3f} | {found['peak']:.0f} | "
            f"{found['data']:.0f} | {found['outputs']} | {found['seconds']:.1f} |",
            flush=True,
        )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
