import sys, os, pickle, time, json, contextlib, importlib
from pathlib import Path
import torch
from tests.ranks import on_ranks
from tests.probe_stage import run
from tests.training.test_stages import RUNS
from tests.tiny import rows_of, WORDS, words_of
from tests.conftest import STEP_JUDGE
from rlhf_cli.config.compose import compose

C = Path("/tmp/shardchain")


def make():
    C.mkdir()
    for file, content in rows_of().items():
        (C / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    (C / "steps.py").write_text(STEP_JUDGE)
    with contextlib.chdir(C):
        for stage, more in (
            ("sft", ["algo.epochs=8", "algo.max_steps=null"]),
            ("reward", ["algo.epochs=6"]),
            ("reward", [*WORDS["lora"], "out=runs/demo/reward_adapter", "algo.epochs=6"]),
            ("dpo", [*WORDS["lora"], "out=runs/demo/adapter", "algo.epochs=2"]),
        ):
            importlib.import_module(f"rlhf_cli.stages.{stage}").run(
                compose(stage, [*words_of(stage), "hardware.save_every=null", *more])
            )


if __name__ == "__main__":
    if not C.exists():
        make()
    ranks = int(sys.argv[1])
    extra = sys.argv[2].split()
    names = sys.argv[3:] or list(RUNS)
    import shutil

    for n in names:
        stage, *words = RUNS[n]
        base = [*words, *os.environ.get("BASE", "").split()]
        shutil.rmtree("/tmp/shardout", ignore_errors=True)
        t = time.time()
        try:
            (a,) = on_ranks(1, run, C, n, stage, base, "/tmp/shardout/one", seconds=100)
            rs = on_ranks(
                ranks, run, C, n, stage, [*base, *extra], "/tmp/shardout/two", seconds=100
            )
        except AssertionError as e:
            tail = str(e).strip().splitlines()
            print(f"FAIL {n}:", *tail[-3:] if len(tail) < 40 else tail[-12:], sep="\n   ")
            open(f"/tmp/fail-{n.replace(' ', '_')}.txt", "w").write(str(e))
            continue
        w = torch.tensor(a[1])
        out = []
        for r in rs:
            dw = (torch.tensor(r[1]) - w).abs().max().item()
            dl = 0
            for x, y in zip(a[0], r[0]):
                for k in x:
                    if isinstance(x[k], float) and not k.startswith(("seconds", "tokens_per")):
                        d = abs(x[k] - y.get(k, 1e9)) / (1e-3 + abs(x[k]))
                        if d > dl:
                            dl = d
                            wk = k
            out.append(
                (
                    f"{dw:.1e}",
                    f"{dl:.1e}",
                    wk if dl else "",
                    f"{r[2] / a[2]:.2f}",
                    len(a[0]) == len(r[0]),
                )
            )
        print("ok ", n, out, f"{time.time() - t:.0f}s", flush=True)
