import contextlib, importlib, json, sys, tempfile, os
from pathlib import Path
import torch
from rlhf_cli.config.compose import compose
from rlhf_cli.ranks.world import world
from tests.tiny import words_of
import rlhf_cli.runs.session as session_module
from rlhf_cli.models.shards import whole, own_part
from rlhf_cli.models.adapters import trained

KEPT = {}


def run(folder, name, stage, words, out):
    import warnings

    warnings.filterwarnings("ignore")
    out = Path(out) / f"r{world().rank}" / name

    def finish(self, model, *a, **k):
        KEPT["w"] = torch.cat(
            [whole(w.detach()).flatten() for w in trained(model).values()]
        ).tolist()
        KEPT["held"] = sum(own_part(w).numel() for w in model.parameters())
        return self.out

    session_module.Session.finish_model = finish
    session_module.Session.save = lambda *a, **k: None
    cwd = os.getcwd()
    with contextlib.chdir(folder):
        given = [w for w in words_of(stage) if not ("ptx" in w and "noptx" in name)]
        cfg = compose(stage, [*given, *words, f"out={out}"])
        importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    lines = [json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, KEPT["w"], KEPT["held"]
