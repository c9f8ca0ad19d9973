"""What can be a reward: heads at every level and implicit ones, in every stage that takes one."""

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from tests.pace import fast
from tests.tiny import DATA, WORDS, words_of

STEPS = "data.path=steps.jsonl"
UPDATES = [
    *("algo.steps=1", "algo.epochs=1", "algo.minibatch_size=8", "hardware.save_every=null"),
    "algo.missing_eos_reward=null",
]
# the folders under runs/rewards, and what makes them
FOLDERS = {
    "step": ["reward", "algo=process", STEPS, "algo.epochs=6"],
    "step, adapter": ["reward", "algo=process", STEPS, "algo.epochs=6", *WORDS["lora"]],
    "token": ["reward", "algo=token", "algo.epochs=3"],
    "bootstrapped": ["dpo", "reference=bootstrap", "algo.epochs=1"],
    "averaged": ["dpo", "algo=length_normalised", "algo.epochs=1"],
    "adapter": ["dpo", *WORDS["lora"], "algo.epochs=1"],
}
IMPLICIT = ("bootstrapped", "averaged", "adapter")


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


def run(stage: str, out: Path | str, *more: str) -> Path:
    start = words_of(stage) if stage in WORDS else [*DATA, "policy=runs/demo/sft"]
    cfg = compose(stage, [*start, *more, f'out="{out}"'])
    found: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return found


@pytest.fixture
def reward(request: pytest.FixtureRequest) -> str:
    """One of FOLDERS, made when it is first asked for."""
    name: str = request.param
    stage, *words = FOLDERS[name]
    out = f"runs/rewards/{name.replace(', ', '-')}"
    run(stage, out, "hardware.save_every=null", *words)  # does nothing the second time
    return out


def read(file: Path) -> Any:
    """A JSON file, which must hold no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


def first_line(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return found


@pytest.mark.parametrize("reward", FOLDERS, indirect=True)
@pytest.mark.slow
def test_every_stage_takes_every_reward(reward: str, tmp_path: Path) -> None:
    spec = f'reward="{reward}"'
    ppo = run("ppo", tmp_path / "ppo", *UPDATES, spec)
    entry = first_line(ppo)
    assert entry["value"] == 0  # of a critic that knows nothing yet
    assert entry["reward_std"] > 0 and entry["loss/value"] > 0
    checks = read(ppo / "stage.json")["checks"]
    assert "critic_minus_reward_at_start" not in checks and checks["reward_accuracy"] > 0.5
    grpo = run("grpo", tmp_path / "grpo", *UPDATES, "algo.group_size=3", spec)
    assert first_line(grpo)["reward_std"] > 0
    sampled = run("generate", tmp_path / "generate", "algo.prompts=6", spec)
    rows = [json.loads(line) for line in (sampled / "samples.jsonl").read_text().splitlines()]
    assert len({row["reward"] for row in rows}) > 1
    few = ["algo.prompts=4", "algo.samples=2", "baselines=[]", "gold=null", "reference=null"]
    report = read(run("evaluate", tmp_path / "evaluate", *few, spec) / "report.json")
    (figures,) = report["policies"].values()
    assert figures["reward"]["stderr"] > 0
    judged = report["reward_model"]
    assert judged["pairs"] == 8
    said = read(Path(reward) / "stage.json")["metrics"]
    if Path(reward).name in IMPLICIT:  # judged on the rows on which dpo judged itself
        assert judged["accuracy"] == pytest.approx(said["eval/rewards/accuracy"], abs=1e-5)
        assert judged["loss"] == pytest.approx(read(Path(reward) / "report.json")["loss"], abs=1e-4)
    if Path(reward).name == "token":
        assert judged["accuracy"] == said["eval/accuracy"]
        assert judged["loss"] == pytest.approx(said["eval/loss"], abs=1e-4)


# --------------------------------------------------------------------------- reports


def test_a_reward_model_reports_how_good_it_is(tmp_path: Path) -> None:
    folder = Path("runs/demo/reward")
    report = read(folder / "report.json")
    assert (folder / "reliability.png").read_bytes()[1:4] == b"PNG"
    assert report["pairs"] == 8
    assert report["accuracy_swapped"] == pytest.approx(1 - report["accuracy"], abs=1e-5)
    assert 0 <= report["accuracy_prompt_exchanged"] <= 1
    assert [part["low"] for part in report["by_row_margin"]] == [0, 0.5, 1]
    said = read(folder / "stage.json")["metrics"]
    for name in ("accuracy", "accuracy_swapped", "loss", "calibration_error"):
        assert said[f"eval/{name}"] == report[name]
    # evaluate judges it once more, on the same rows
    words = ["reward=runs/demo/reward", "algo.prompts=2", "algo.samples=1", "baselines=[]"]
    alone = ["gold=null", "reference=null"]
    again = read(run("evaluate", tmp_path / "again", *words, *alone) / "report.json")
    swapped = {"accuracy_swapped", "accuracy_prompt_exchanged"}
    expected = {name: value for name, value in report.items() if name not in swapped}
    found = again["reward_model"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float | int):
            assert found[name] == pytest.approx(value, abs=1e-5), name
    # rankings are comparisons as well; thumbs are none, and a rule is no model
    converted = "data.convert=[ranking_to_preference]"
    for i, (more, parts) in enumerate(
        [
            (["data.path=rankings.jsonl"], {"rankings", "prompts"}),
            (["data.path=rankings.jsonl", converted], {"prompts"}),
            (["data.path=feedback.jsonl"], set()),
            (["reward=regex:a"], set()),
        ]
    ):
        out = run("evaluate", tmp_path / f"other{i}", *words, *alone, *more)
        judged = read(out / "report.json")["reward_model"]
        assert (judged is None) == (not parts)
        if parts:
            assert judged["pairs"] > 8 and {judged[part] for part in parts} == {8}
            assert ("rankings" in judged) == ("rankings" in parts)


JUDGED: dict[str, tuple[list[str], bool, list[str]]] = {
    "kwise": (
        ["reward", "algo=kwise", "data.path=rankings.jsonl"],
        True,
        ["rankings", "kendall_tau", "top1", "accuracy_swapped"],
    ),
    "label": (
        ["reward", "algo=pointwise", "data.path=feedback.jsonl"],
        True,
        ["labels", "auc", "base_rate"],
    ),
    "score": (
        ["reward", "algo=pointwise", "algo.target=score", "data.path=feedback.jsonl"],
        False,
        ["targets", "mse", "r2", "correlation"],
    ),
    "steps": (["reward", "algo=process", STEPS], True, ["labels", "auc", "base_rate"]),
    "token": (["reward", "algo=token"], True, ["pairs", "accuracy_prompt_exchanged"]),
    "dpo": (["dpo"], True, ["pairs", "accuracy", "calibration_error"]),
    "simpo": (["dpo", "algo=simpo"], True, ["pairs", "accuracy"]),
    "plackett_luce": (
        ["dpo", "algo=plackett_luce", "data.path=rankings.jsonl"],
        True,
        ["rankings", "kendall_tau"],
    ),
    "kto": (["dpo", "algo=kto", "data.path=feedback.jsonl"], True, ["labels", "auc"]),
}


@pytest.mark.parametrize("name", fast(["score", "steps", "dpo", "kto"], JUDGED))
def test_every_reward_has_a_report(name: str, tmp_path: Path) -> None:
    (stage, *words), picture, names = JUDGED[name]
    out = run(stage, tmp_path, *words, "algo.epochs=1", "hardware.save_every=null")
    report, said = read(out / "report.json"), read(out / "stage.json")["metrics"]
    assert (out / "reliability.png").exists() == picture
    for figure in names:
        assert said[f"eval/{figure}"] == report[figure]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert said["eval/loss" if picture else "eval/mse"] == pytest.approx(
        last["eval/loss" if picture else "eval/mse"], abs=1e-5
    )


def test_a_source_with_its_sides_turned_round_is_found_and_refused(tmp_path: Path) -> None:
    """Among the rows of all it hides: most pairs are ordered rightly."""
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for name, part in (("right", rows[::4] + rows[3::4]), ("turned", rows[1::4] + rows[2::4])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    turned = (tmp_path / "turned.jsonl").read_text()
    turned = turned.replace('"chosen"', '"better"').replace('"rejected"', '"chosen"')
    (tmp_path / "turned.jsonl").write_text(turned.replace('"better"', '"rejected"'))
    sources = [f"{{path: {tmp_path}/right.jsonl, name: one, weight: 19}}"]
    sources += [f"{{path: {tmp_path}/turned.jsonl, name: two, weight: 1}}"]
    words = ["data.path=null", f"data.sources=[{','.join(sources)}]", "data.eval_rows=24"]
    out = run("reward", tmp_path / "reward", *words, "algo.epochs=8")
    report, said = read(out / "report.json"), read(out / "stage.json")["metrics"]
    one, two = report["by_source"]
    assert (one["source"], two["source"]) == ("one", "two")
    assert one["pairs"] + two["pairs"] == report["pairs"] == 24
    whole = one["pairs"] * one["accuracy"] + two["pairs"] * two["accuracy"]
    assert report["accuracy"] == pytest.approx(whole / 24, abs=1e-5)
    assert one["accuracy_low"] > 0.5 > two["accuracy_high"]
    for name in ("accuracy", "accuracy_stderr", "accuracy_low", "accuracy_high"):
        assert said[f"eval/source/two/{name}"] == two[name]
    with pytest.raises(RunError, match=r"reward_accuracy_high/two failed .* rows of two; check"):
        run("ppo", tmp_path / "ppo", *UPDATES, f"reward={out}")
    assert report["accuracy"] > 0.5  # by which alone it would have passed


def test_swapped_rankings_are_the_complement(tmp_path: Path) -> None:
    words = ["algo=kwise", "data.path=rankings.jsonl", "algo.epochs=1", "hardware.save_every=null"]
    report = read(run("reward", tmp_path, *words) / "report.json")
    assert report["accuracy_swapped"] == pytest.approx(1 - report["accuracy"], abs=1e-5)


def held_out_feedback(folder: Path, *labels: bool) -> str:
    """A file of held-out rows, a prompt for each label."""
    lines = [
        {"prompt": f"Greet A{i}: ", "completion": f"Hi A{i}!", "label": label}
        for i, label in enumerate(labels)
    ]
    file = folder / "held_out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"data.eval_path={file}"


@pytest.mark.parametrize("good", [True, False])
def test_held_out_feedback_may_be_of_one_class(good: bool, tmp_path: Path) -> None:
    """Its reward has a mean and a standard deviation all the same, or is no reward."""
    words = ["algo=kto", "data.path=feedback.jsonl", "algo.epochs=1"]
    out = run("dpo", tmp_path / "out", *words, held_out_feedback(tmp_path, good, good, good))
    manifest = read(out / "stage.json")
    assert ("eval/rewards/chosen" in manifest["metrics"]) == good
    assert ("eval/rewards/rejected" in manifest["metrics"]) != good
    assert "reward" not in manifest or manifest["reward"]["std"] > 0


def test_one_held_out_prompt_for_kto_is_enough_or_named(tmp_path: Path) -> None:
    words = ["algo=kto", "data.path=feedback.jsonl", "algo.epochs=1"]
    try:
        run("dpo", tmp_path / "out", *words, held_out_feedback(tmp_path, True))
    except UserError as error:
        assert "held-out" in str(error) or "held_out" in str(error)


def test_a_reward_model_goes_on_with_its_head(tmp_path: Path) -> None:
    """Preference model pretraining: what was learnt elsewhere is the start, head and all."""
    start = Path("runs/demo/reward")
    out = run("reward", tmp_path, f"policy={start}", "algo.max_steps=1", "algo.lr=1e-12")
    before, after = (load_file(each / "model.safetensors") for each in (start, out))
    assert before.keys() == after.keys() and any("score" in name for name in after)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
    assert read(out / "stage.json")["parents"]["policy"]["path"] == str(start)


def test_a_reward_model_of_another_level_does_not_go_on(tmp_path: Path) -> None:
    said = "policy=runs/demo/reward is a reward model that judges each response, and this loss each"
    with pytest.raises(UserError, match=said):
        run("reward", tmp_path, "policy=runs/demo/reward", "algo=token")
    assert not list(tmp_path.iterdir())
