"""What trackers hear, and that none of them stops or slows a run: with a tracker that is a fake."""

import time
from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import Interrupted, UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.reporting.trackers import about, outlets
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.config_diff import differing_keys, flatten
from rlhf_cli.runs.preflight import preflight
from tests.reporting.tracked import CONFIG, LINEAGE, TERM, begun, calls, fake, hear
from tests.tiny import run_stage


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, whose modules are found before others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_tracker_hears_of_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fake(here)
    trackers = begun("wandb")
    hear(trackers, 1, 2)
    trackers.finish({"reward": 0.5, "note": "text", "policies": {"a/b": {"gold": {"mean": 2}}}})
    init, first, table, second, _, summary, finish = calls(here)
    assert init["id"] == "0123456789ab" and init["project"] == "demo"
    assert init["name"] == "runs/demo/ppo" and init["job_type"] == "ppo"
    assert init["config"].items() >= {**CONFIG, **LINEAGE, "command": "rlhf-cli ppo seed=3"}.items()
    assert first == {"what": "log", "step": 1, "loss": 1.0, "skipped": 0.0, TERM: 1.0}
    rows = [["Greet A", "<b>Hi", 0.5], ["Greet A", "No.", 0.5]]
    assert table == {"what": "log", "step": 1, "samples": [["prompt", "response", "reward"], rows]}
    assert second["step"] == 2
    assert summary == {"what": "summary", "final/reward": 0.5, "final/policies/a/b/gold/mean": 2}
    assert finish["exit_code"] == 0
    assert "wandb: https://tracker.test/run" in capfd.readouterr().err


def test_a_run_without_an_end_has_failed(here: Path) -> None:
    fake(here)
    trackers = begun("wandb")
    hear(trackers, 1)
    outlets.leave_all()
    assert [call["what"] for call in calls(here)] == ["init", "log", "log", "finish"]
    assert calls(here)[-1]["exit_code"] == 1


def test_no_secret_reaches_a_tracker(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(here)
    monkeypatch.setenv("HF_TOKEN", 'se"cret\n-123')
    monkeypatch.setenv("PLACE", "a-place")
    trackers = begun("wandb", command='rlhf-cli ppo name=se"cret\n-123')
    sample = {"step": 1, "prompt": 'say se"cret\n-123', "response": "a-place", "reward": None}
    trackers.hear("samples.jsonl", sample)
    trackers.hear("metrics.jsonl", {"step": 1, 'reward/se"cret\n-123/mean': 1.0})
    trackers.finish({})
    told = (here / "calls.jsonl").read_text()
    assert "cret" not in told.replace("secret_key", "") and told.count("[HF_TOKEN]") == 3
    assert "a-place" in told


def test_a_tracker_that_hangs_costs_no_time(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(here, in_init="time.sleep(600)")
    monkeypatch.setattr(outlets, "PATIENCE", 0.6)
    monkeypatch.setattr(outlets, "SILENT", 0.3)
    monkeypatch.setattr(outlets, "MOST_WAITING", 2000)
    trackers = begun("wandb")
    start = time.monotonic()
    hear(trackers, *range(1, 1500))
    assert time.monotonic() - start < 5  # far below one wait for each row
    trackers.finish({})
    assert time.monotonic() - start < 10
    said = capfd.readouterr().err.splitlines()
    assert said == ["note: tracker wandb has left 2000 rows lying; the run goes on without it"]
    trackers = begun("wandb")
    trackers.finish({})
    assert capfd.readouterr().err.splitlines() == [
        "waiting for wandb to take what was logged, 1 s at most",
        "note: tracker wandb had not taken all within 1 s, and was ended",
    ]


@pytest.mark.parametrize(
    ("in_init", "in_log", "line"),
    [
        ("raise OSError('no\\nkey')", "", "failed: OSError: no key; the run goes on without it"),
        ("raise SystemExit(3)", "", "failed: SystemExit: 3; the run goes on without it"),
        ("os._exit(3)", "", "has ended with status 3; the run goes on without it"),
        ("", "if row['step'] < 3: raise OSError('down')", "left something out: OSError: down"),
    ],
)
def test_a_tracker_that_fails_is_said_once(
    in_init: str, in_log: str, line: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(here, in_init, in_log)
    trackers = begun("wandb")
    hear(trackers, 1, 2)
    if in_init:  # it has time to fail while the run goes on
        assert trackers._outlets[0].ended(20)
    hear(trackers, 3)
    trackers.finish({})
    notes = [each for each in capfd.readouterr().err.splitlines() if each.startswith("note")]
    assert notes == [f"note: tracker wandb {line}"]
    if in_log:  # what came later was taken
        assert [call.get("step") for call in calls(here)] == [None, 3, 3, None, None]


def test_a_resumed_run_goes_on_in_the_same_run(
    chain: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(here)
    monkeypatch.chdir(chain)
    out, words = here / "sft", ["tracker=wandb", "algo.max_steps=4"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(interrupts, "asked", lambda: "SIGTERM")
        run_stage("sft", out, *words)
    outlets.leave_all()
    run_stage("sft", out, *words)
    told = calls(chain)
    assert [call.get("step") for call in told if call["what"] == "log"] == [1, 2, 3, 4]
    first, again = (call for call in told if call["what"] == "init")
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert [call["exit_code"] for call in told if call["what"] == "finish"] == [1, 0]
    assert again["config"]["inputs"]
    summary = next(call for call in told if call["what"] == "summary")
    assert "final/eval/loss" in summary


def test_a_tracker_that_is_not_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about, "find_spec", lambda name: None if name == "trackio" else name)
    cfg = compose("sft", ["tracker=[tensorboard,trackio]"])
    with pytest.raises(
        UserError, match=r"tracker=trackio needs trackio: pip install .*\[trackio\]"
    ):
        preflight(cfg, check_only=True)


def test_one_or_several() -> None:
    def given(*words: str) -> Run:
        cfg: Run = compose("evaluate", list(words))
        return cfg

    assert given().trackers == []
    assert given("tracker=wandb").trackers == ["wandb"]
    assert given("tracker=[mlflow,wandb,mlflow]").trackers == ["mlflow", "wandb"]
    for wrong in ("wandbb", "[wandb,x]"):
        with pytest.raises(UserError, match="tracker"):
            given(f"tracker={wrong}")
    assert not differing_keys({"tracker": None}, flatten({"tracker": "wandb"}), {})
