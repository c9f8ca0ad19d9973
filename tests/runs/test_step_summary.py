"""The end of a run on the page of a CI job."""

from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.runs.step_summary import VARIABLE, append_summary, markdown

ROWS = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5}]
FINAL = {"reward": 0.5, "reward_stderr": 0.03, "kl": 1.5}


def test_a_stage_has_its_lines_and_a_table() -> None:
    cfg = compose("ppo", ["out=runs/<b>_x_|y"])
    assert markdown(cfg, ["ppo: the reward *rose*", "next: x"], FINAL, ROWS).splitlines() == [
        "",
        r"### ppo: runs/\<b\>\_x\_\|y",
        "",
        r"ppo: the reward \*rose\*",
        "",
        "next: x",
        "",
        "| metric | first | course | written |",
        "| --- | --- | --- | --- |",
        "| reward | 0.25 | ▁█ | 0.500 ± 0.030 |",
        "| kl |  |  | 1.5 |",
    ]


def test_an_evaluation_has_its_policies() -> None:
    metrics = {
        "policies": {
            "a": {"gold": {"mean": 2.5, "stderr": 0.25}, "kl": None},
            "b": {
                "reward": {"mean": 1.0, "stderr": None},
                "kl_bound": {"mean": 2.5, "stderr": 0.25},
            },
        },
        "ratings": {"a": {"rating": 12.3}},
    }
    assert markdown(compose("evaluate", []), [], metrics, []).splitlines()[3:] == [
        "| policy | gold | reward | kl | rating |",
        "| --- | --- | --- | --- | --- |",
        "| a | 2.50 ± 0.25 |  |  | 12 |",
        "| b |  | 1 | at most 2.50 ± 0.25 |  |",
    ]


def test_it_is_appended_where_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose("sft", [])
    monkeypatch.delenv(VARIABLE, raising=False)
    append_summary(cfg, ["x"], {}, [])
    monkeypatch.setenv(VARIABLE, str(tmp_path))  # no file: the run has ended well all the same
    append_summary(cfg, ["x"], {}, [])
    file = tmp_path / "summary.md"
    monkeypatch.setenv(VARIABLE, str(file))
    for line in ("one", "two"):
        append_summary(cfg, [line], {}, [])
    text = file.read_text()
    assert text.count("### sft: runs/demo/sft") == 2 and text.index("one") < text.index("two")
