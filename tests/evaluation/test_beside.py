"""The end of an evaluation: a table that fits, and a line each for what was asked for beside it."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.evaluation.beside import lines_beside
from rlhf_cli.evaluation.report import show_report

NAMES = [f"runs/a/{name}" for name in ("sft", "ppo", "dpo", "grpo", "best", "other", "more")]
MOST = 12  # lines at the end of a stage, of which summary.py has four and a reward model one


def rate(win: float) -> dict[str, Any]:
    figures = {"tie": 0.1, "loss": 0.9 - win, "low": win - 0.1, "high": win + 0.1}
    return {"win": win, **figures, "p_holm": 0.03, "p": 0.01, "failed": 2}


def report_of(names: list[str]) -> dict[str, Any]:
    """All that an evaluation of the second one can have."""
    estimate = {"mean": 0.745, "stderr": 0.02}
    figures = {
        **dict.fromkeys(("gold", "reward", "kl", "choices", "choices_change"), estimate),
        "text_loss": 1.25,
        "text_loss_change": estimate,
    }
    policy, *others = names[1], names[0], *names[2:]
    wins = {name: rate(0.5) for name in others}
    return {
        "policies": dict.fromkeys([policy, *others], figures),
        "win_rates": wins,
        "against_references": {name: rate(0.6) for name in names},
        "ratings": {name: {"rating": 12.4, "not_separable": []} for name in names},
        "anchor": names[0],
        "frontier": [],
        "prompts": 16,
        "choices_by_chance": 0.5,
        "by_temperature": {
            t: {"win_rates": wins, "against_references": {policy: rate(0.7)}} for t in ("0", "1")
        },
        "judge": {
            "judge": "http://x",
            "win_rates": wins,
            "failed": 12,
            "consistency": {"mean": 0.5},
            "agreement": {"gold": None, "people": {"mean": 0.7, "pairs": 40}},
        },
    }


def test_each_thing_is_a_line() -> None:
    report = report_of(NAMES)
    tax, judge, temperature = lines_beside(report, NAMES[1], lambda path: Path(path).name)
    assert tax == (
        "tax of ppo to the reference: text loss +0.745 ± 0.020, "
        "choices right 0.745 ± 0.020 (+0.745 ± 0.020)"
    )
    assert judge.startswith(
        "http://x as judge: ppo wins against sft 0.55 (0.40 to 0.60), dpo 0.55 (0.40 to 0.60), "
        "grpo 0.55 (0.40 to 0.60) and 3 more; both orders agree in 0.50: it often goes by the order"
    )
    assert judge.endswith("it agrees with people on 0.70 of 40 pairs; 12 pairs without a verdict")
    assert temperature == "by temperature ppo wins against the references: 0.75 at 0, 0.75 at 1"
    report["judge"] |= {"win_rates": {}, "failed": 0, "consistency": None, "agreement": {}}
    _, judge, _ = lines_beside(report, NAMES[1], lambda path: Path(path).name)
    assert judge == "http://x as judge: ppo stands against nobody"
    report["by_temperature"]["0"]["against_references"] = {}  # nothing has all scores there
    *_, temperature = lines_beside(report, NAMES[1], lambda path: Path(path).name)
    assert temperature == "by temperature ppo wins against the references: 0.75 at 1"
    for each in report["by_temperature"].values():
        each["against_references"] = {}
    *_, temperature = lines_beside(report, NAMES[1], lambda path: Path(path).name)
    assert temperature == "by temperature ppo wins against sft: 0.55 at 0, 0.55 at 1"
    nothing: dict[str, Any] = {"choices_by_chance": None, "by_temperature": {}}
    assert lines_beside(nothing, NAMES[1], str) == []


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("names", [NAMES, NAMES[:3]])
def test_it_is_a_dozen_lines_at_most_whatever_was_asked(
    columns: int,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    words = [f"policy={names[1]}", f"reference={names[0]}", "baselines=[]", "gold=demo_gold"]
    show_report(compose("evaluate", words), report_of(names))
    said = capsys.readouterr().err.splitlines()
    assert len(said) <= MOST - 5, said
    table = said[:-4]
    assert all(len(line) <= columns for line in table), table
    assert table[0].split()[0] == "policy" and ("held-out" in table[0]) == (columns == 120)
    assert [line.split()[0] for line in table[1:]] == [
        "ppo",
        "sft",
    ]  # the judged one, the reference
    assert ("in report.json" in said[-4]) and ("5 more policies" in said[-4]) == (names == NAMES)
