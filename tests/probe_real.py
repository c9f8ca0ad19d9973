import sys, os, time, json, contextlib, importlib, shutil, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
from tests.ranks import on_ranks
from tests.training.test_stages import RUNS
from tests.tiny import WORDS, words_of
from rlhf_cli.config.compose import compose
from rlhf_cli.ranks.world import world

C = Path("/tmp/shardchain")
REF=["judge=regex:H", "algo.refresh_reward=2", "algo.refresh_lr=1e-3","algo.refresh_batch_size=4","algo.refresh_replay=0.25"]
RUNS["refresh"]=["grpo","reward=runs/demo/reward",*REF]
RUNS["refresh lora"]=["grpo",*WORDS["lora"],"reward=runs/demo/reward_adapter",*REF]


def run(stage, words, out):
    warnings.filterwarnings("ignore")
    with contextlib.chdir(C):
        cfg = compose(stage, [*words_of(stage), *words, f"out={out}"])
        importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)


def sets(out):
    return {str(f.relative_to(out)): load_file(f) for f in sorted(Path(out).rglob("*.safetensors"))}


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    extra = sys.argv[2].split()
    names = sys.argv[3:] or list(RUNS)
    for n in names:
        stage, *words = RUNS[n]
        words = [*words, *os.environ.get("BASE", "").split()]
        shutil.rmtree("/tmp/shardout", ignore_errors=True)
        t = time.time()
        try:
            run(stage, words, "/tmp/shardout/one")
            on_ranks(ranks, run, stage, [*words, *extra], "/tmp/shardout/two", seconds=150)
        except (AssertionError, Exception) as e:
            open(f"/tmp/fail-{n.replace(' ', '_')}.txt", "w").write(str(e))
            print(
                f"FAIL {n}:",
                *[l for l in str(e).splitlines() if "Error" in l][:3],
                sep="\n   ",
                flush=True,
            )
            continue
        a, b = sets("/tmp/shardout/one"), sets("/tmp/shardout/two")
        d = 0
        assert a.keys() == b.keys(), (a.keys(), b.keys())
        for f in a:
            assert a[f].keys() == b[f].keys(), a[f].keys() ^ b[f].keys()
            for k in a[f]:
                d = max(d, (a[f][k].float() - b[f][k].float()).abs().max().item())
        fa, fb = (
            {str(p.relative_to(o)) for p in Path(o).rglob("*")}
            for o in ("/tmp/shardout/one", "/tmp/shardout/two")
        )
        print("ok", n, f"{d:.1e}", sorted(fa ^ fb)[:6], f"{time.time() - t:.0f}s", flush=True)
