"""Which models a stage reads, by the keys that name them."""

import json
from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.runs.provenance import (
    data_files,
    folders_of_rows,
    input_hash,
    inputs_read,
    models_read,
    parents_of,
    places_read,
    provenance_of,
)

SEALED = {"size": 0, "sha256": ""}
DATA = ["data=jsonl", "data.path=rows.jsonl"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Folders that pass for finished policies and scorers."""
    for name in ("policy", "other", "reward", "gold"):
        (tmp_path / name).mkdir()
        kind = "reward" if name in ("reward", "gold") else "policy"
        (tmp_path / name / "stage.json").write_text(f'{{"kind": "{kind}", "complete": true}}')
    return tmp_path


def test_gold_is_loaded_but_no_parent(made: Path) -> None:
    words = [f"policy={made}/policy", f"reward={made}/reward + owner/name", f"gold={made}/gold"]
    cfg = compose("ppo", [*DATA, *words, "algo.eval_every=1"])
    parents = {"policy": f"{made}/policy", "reward": f"{made}/reward"}
    assert models_read(cfg) == {**parents, "reward[1]": "owner/name", "gold": f"{made}/gold"}
    assert parents_of(cfg) == parents


def test_a_reference_that_is_bootstrapped_is_none_of_them(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made / "bootstrap").mkdir()
    monkeypatch.chdir(made)
    cfg = compose("dpo", [*DATA, "policy=policy", "reference=bootstrap"])
    assert models_read(cfg) == {"policy": "policy"}
    cfg = compose("dpo", [*DATA, "policy=policy", "reference=other"])
    assert models_read(cfg) == {"policy": "policy", "reference": "other"}


def test_baselines_are_those_given_or_the_policies_beside(made: Path) -> None:
    words = [*DATA, f"policy={made}/policy", "reference=null", "reward=json"]
    beside = {f"baseline {made}/{name}": f"{made}/{name}" for name in ("other", "policy")}
    assert models_read(compose("evaluate", words)) == {"policy": f"{made}/policy", **beside}
    cfg = compose("evaluate", [*words, "baselines=[owner/name]"])
    read = {"policy": f"{made}/policy", "baseline owner/name": "owner/name"}
    assert models_read(cfg) == read
    assert models_read(compose("evaluate", [*words, "baselines=[]"])) == {"policy": read["policy"]}


def test_a_pretrained_model_is_the_model_of_sft() -> None:
    cfg = compose("sft", [*DATA, "model=pretrained", "model.path=owner/name", "algo.text_mix=0"])
    assert models_read(cfg) == {"model": "owner/name"}
    assert models_read(compose("sft", ["model=tiny"])) == {}


def test_rows_that_a_stage_has_left_name_their_folder(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By file, list, folder and pattern, and by data.sources; not while the stage goes on."""
    monkeypatch.chdir(made)
    for name, kind in (("r1/label", "labels"), ("r2/label", "labels"), ("best", "samples")):
        Path(name).mkdir(parents=True)
        Path(name, "rankings.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        said = {"kind": kind, "complete": True, "files": {"rankings.jsonl": SEALED}}
        Path(name, "stage.json").write_text(json.dumps(said))
    Path("begun").mkdir()
    Path("stage.json").write_text('{"stages": 3}')  # of another tool
    for place in ("begun/rankings.jsonl", "rows.jsonl"):
        Path(place).write_text('{"prompt": "mine"}\n')

    def found(*words: str) -> list[str]:
        return folders_of_rows(compose("reward", ["policy=policy", "data=jsonl", *words]))

    labels = [f"r{number}/label" for number in (1, 2)]
    files = [f"{label}/rankings.jsonl" for label in labels]
    assert found(f"data.path=[{','.join([*files, 'begun/rankings.jsonl', 'rows.jsonl'])}]") == (
        labels
    )
    assert found("data.path='r*/label/rankings.jsonl'", "data.eval_path=best") == [*labels, "best"]
    sources = f"data.sources=[{{path: {files[1]}}}, {{path: [best, {files[0]}]}}]"
    words = ["policy=policy", "data=jsonl", sources]
    cfg = compose("reward", words)
    assert folders_of_rows(cfg) == [labels[1], "best", labels[0]]
    before = provenance_of(cfg)
    assert list(before["parents"]) == [*("policy", "rows r2/label", "rows best", "rows r1/label")]
    assert before["inputs"]["data.sources[1].path[0]"]["path"] == "best"
    Path(files[0]).write_text('{"prompt": "other"}\n')
    after = provenance_of(cfg)
    changed = [
        role for role in before["parents"] if after["parents"][role] != before["parents"][role]
    ]
    assert changed == ["rows r1/label"]


def test_data_are_hashed_over_all_files_of_a_path(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns and lists too: another byte, and one more file, make another hash."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("HOME", str(made))
    for name in ("a.jsonl", "more/train.jsonl", "more/deep/test.jsonl"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text('{"prompt": "p"}\n')
    words = ["data=jsonl", "data.path=['*.jsonl','~/more']", "policy=policy", "reward=json"]
    cfg = compose("ppo", words)
    assert inputs_read(cfg) == {"data.path[0]": "*.jsonl", "data.path[1]": "~/more"}
    files = [made / "more/train.jsonl", made / "more/deep/test.jsonl"]
    assert [place for role, place in places_read(cfg) if role == "data.path[0]"] == [
        Path("a.jsonl")
    ]
    assert data_files("~/more") == files
    first, second = input_hash("*.jsonl"), input_hash("~/more")
    files[1].write_text('{"prompt": "q"}\n')
    assert (input_hash("*.jsonl") == first, input_hash("~/more") == second) == (True, False)
    (made / "b.jsonl").write_text('{"prompt": "q"}\n')
    assert input_hash("*.jsonl") != first and input_hash("x*") is None
