"""Policies that a run keeps on its way: whole folders, which change nothing of the run."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import export
from rlhf_cli.config.compose import compose
from rlhf_cli.folders.manifest import content_hash, read_manifest
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.runs.lineage import runs_in
from rlhf_cli.runs.out_files import snapshot, snapshot_step
from rlhf_cli.runs.out_folder import FINISHED, state_of
from rlhf_cli.stages import evaluate
from tests.contents import contents_of, faults_of
from tests.pace import fast
from tests.tiny import DATA, WORDS, run_stage, words_of

EVERY = "algo.snapshot_every=2"
RUNS = {
    "sft": ["algo.keep=last"],
    "dpo": WORDS["lora"],
    "dpo merged": [*WORDS["lora"], "model.merge_lora=true"],
    "ppo": ["algo.ema_decay=0.8", "reward=regex:a", "model.dtype=bfloat16"],
    "grpo": ["model.save_dtype=bfloat16"],
}


class Killed(Exception):
    """As if the process had been killed."""


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


def run(name: str, out: Path, *more: str) -> list[dict[str, Any]]:
    return run_stage(name.split()[0], out, *RUNS[name], *more)


def made(out: Path) -> dict[str, Any]:
    """All in a run's folder but its config and picture, which name the folder."""
    return {
        name: each
        for name, each in contents_of(out).items()
        if not name.endswith(("config.yaml", ".png"))
    }


@pytest.mark.parametrize("name", fast(["sft"], RUNS))
def test_a_snapshot_is_what_the_run_would_write_then(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of the last step is what it did write; a run without any ends with the same bytes,
    and so does one that was killed and goes on.
    """
    out = tmp_path / "out"
    steps = run(name, out, EVERY)[-1]["step"]
    kept = [snapshot(out, step, steps) for step in range(2, steps + 1, 2)]
    assert sorted(out.glob("step-*")) == kept and len(kept) > 2
    for i, folder in enumerate(kept):
        assert faults_of(folder) == []
        assert snapshot_step(folder) == 2 * i + 2
    said, last = read_manifest(out) or {}, read_manifest(kept[-1]) or {}
    own = {"files", "seconds", "step"}
    assert all(last[key] == said[key] for key in last.keys() - own)
    names = {"model.safetensors", "adapter_model.safetensors", "config.json", "tokenizer.json"}
    same = names & said["files"].keys()
    assert len(same) > 1 and all(last["files"][key] == said["files"][key] for key in same)
    assert len({content_hash(str(each)) for each in kept}) == len(kept)

    whole = made(out)
    without = {key: each for key, each in whole.items() if not key.startswith("step-")}
    run(name, tmp_path / "plain")
    assert made(tmp_path / "plain") == without

    write = JsonLines.write

    def dying(log: JsonLines, number: int, values: dict[str, Any]) -> None:
        if number == 4:  # the snapshot of step 2 is there, and that of step 4 is not
            raise Killed
        write(log, number, values)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", dying)
        with pytest.raises(Killed):
            run(name, tmp_path / "killed", EVERY)
    assert [each.name for each in (tmp_path / "killed").glob("step-*")] == [kept[0].name]
    run(name, tmp_path / "killed", EVERY)
    assert made(tmp_path / "killed") == whole


def test_a_snapshot_may_go_and_is_no_run(tmp_path: Path) -> None:
    out = tmp_path / "sft"
    run("sft", out, EVERY)
    first, *others = sorted(out.glob("step-*"))
    assert list(runs_in([tmp_path])) == [out]
    assert list(runs_in([first])) == [first]
    export.run([str(first), str(out / "mine")])  # made of one, and none itself
    said = read_manifest(out / "mine") or {}
    assert snapshot_step(out / "mine") is None and said["exported"]["step"] == 2
    shutil.rmtree(out / "mine")
    shutil.rmtree(first)
    cfg = compose("sft", [*words_of("sft"), *RUNS["sft"], EVERY, f"out={out}"])
    assert state_of(cfg) == FINISHED
    shutil.copytree(others[0], tmp_path / "copy")  # elsewhere it is a policy as any other
    assert snapshot_step(tmp_path / "copy") is None
    assert snapshot_step(out) is None


def test_a_run_that_is_too_short_for_a_snapshot_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for every, told in ((6, False), (7, True)):
        out = tmp_path / str(every)
        run("sft", out, f"algo.snapshot_every={every}")  # of 6 steps
        line = "note: algo.snapshot_every=7, but the run has 6 steps: no policy is kept on its way"
        said = " ".join(capsys.readouterr().err.split())
        assert (line in said, snapshots(out)) == (told, [] if told else ["step-6"])


def test_a_run_that_is_given_more_steps_makes_later_snapshots_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end has more digits: what lay ahead of the resume point would be there twice."""
    write = JsonLines.write

    def dying(log: JsonLines, number: int, values: dict[str, Any]) -> None:
        write(log, number, values)
        if number == 7:
            (tmp_path / "out/.step-8.part").mkdir()  # as if it were killed while it writes that
            raise Killed

    words = ["hardware.save_every=4", "algo.epochs=20"]
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", dying)
        with pytest.raises(Killed):
            run("sft", tmp_path / "out", EVERY, *words, "algo.max_steps=9")
    assert snapshots(tmp_path / "out") == ["step-2", "step-4", "step-6"]
    run("sft", tmp_path / "out", "algo.snapshot_every=3", *words, "algo.max_steps=12")
    assert snapshots(tmp_path / "out") == ["step-06", "step-09", "step-12", "step-2", "step-4"]
    assert faults_of(tmp_path / "out") == []


def snapshots(out: Path) -> list[str]:
    return sorted(each.name for each in out.glob("step-*"))


def test_names_stand_in_the_order_of_steps() -> None:
    names = [snapshot(Path("out"), step, 120).name for step in (5, 10, 100)]
    assert names == sorted(names) == ["step-005", "step-010", "step-100"]


def test_an_evaluation_draws_the_way_of_a_run(tmp_path: Path) -> None:
    """Of all its snapshots by a pattern."""
    shutil.copytree("runs", tmp_path / "runs")
    shutil.copy("rows.jsonl", tmp_path)
    with contextlib.chdir(tmp_path):
        run("grpo", Path("runs/demo/grpo"), EVERY, "data.text_path=null", "policy=runs/demo/sft")
        words = [
            *("policy=runs/demo/grpo", "baselines=[runs/demo/grpo/step-*,runs/demo/sft]"),
            *("reward=regex:a", "gold=null", "reference=runs/demo/sft", "algo.prompts=4"),
            *("algo.samples=2", "data.text_path=null", "out=out"),
        ]
        evaluate.run(compose("evaluate", [*DATA, *words]))
        report = json.loads(Path("out/report.json").read_text())
    points = [point for point in report["frontier"] if point["from"] == "snapshot"]
    assert [(point["run"], point["step"]) for point in points] == [
        ("runs/demo/grpo", step) for step in (2, 4, 6)
    ]
    assert points[-1]["policy"] == "runs/demo/grpo/step-6"
    parents = json.loads((tmp_path / "out/stage.json").read_text())["parents"]
    assert parents["baseline runs/demo/grpo/step-2"]["hash"]
