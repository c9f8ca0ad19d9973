"""Rounds by their evaluations: what each has gained, which policy is best, and when they end."""

import json
from pathlib import Path

import pytest

from rlhf_cli.commands import rounds
from rlhf_cli.config.errors import UserError
from rlhf_cli.runs.rounds import has_settled, read_rounds

Wins = dict[str, tuple[float, float]]
"""policy -> wins without ties over it, and half the width of the interval."""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def rates(wins: Wins) -> dict[str, dict[str, float]]:
    return {
        other: {"win": share - 0.1, "tie": 0.2, "low": share - half, "high": share + half}
        for other, (share, half) in wins.items()
    }


def evaluation(number: int, wins: Wins, judged: Wins | None = None, **said: bool) -> Path:
    """What evaluate leaves of the policy r1, r2, ... against the ones before it."""
    folder, policy = Path(f"round{number}/evaluate"), f"r{number}"
    folder.mkdir(parents=True)
    parents = {"policy": {"path": policy, "hash": "a"}, "reference": {"path": "sft", "hash": "b"}}
    manifest = {"stage": "evaluate", "kind": "report", "parents": parents, "complete": True}
    (folder / "stage.json").write_text(json.dumps(manifest | said))
    report = {"policies": {policy: {}, "sft": {}}, "win_rates": rates(wins)}
    if judged is not None:
        report["judge"] = {"win_rates": rates(judged)}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_best_policy_is_labelled_next(capsys: pytest.CaptureFixture[str]) -> None:
    """The third round is worse than the second, so the second one stays the best."""
    first = evaluation(1, {"sft": (0.7, 0.05)})
    second = evaluation(2, {"sft": (0.8, 0.05), "r1": (0.6, 0.04)})
    third = evaluation(3, {"sft": (0.75, 0.05), "r1": (0.55, 0.1), "r2": (0.45, 0.1)})
    assert [each.best for each in read_rounds([first, second, third])] == ["r1", "r2", "r2"]
    assert not has_settled(read_rounds([first, second, third]))
    rounds.run([str(first), str(second), str(third)])
    shown = capsys.readouterr()
    assert shown.out == "r2\n"
    assert shown.err.splitlines() == [
        "round  policy           wins, 95 %  over",
        "    1  r1      0.70 (0.65 to 0.75)  sft",
        "    2  r2      0.60 (0.56 to 0.64)  r1",
        "    3  r3      0.45 (0.35 to 0.55)  r2",
    ]


@pytest.mark.parametrize(
    ("shares", "settled"),
    [
        ([0.7], False),
        ([0.5], False),
        ([0.7, 0.52], False),
        ([0.52, 0.7], False),
        ([0.52, 0.52], True),
        ([0.7, 0.52, 0.48], True),
        ([0.52, 0.7, 0.52], False),
        ([0.7, 0.4, 0.52], True),  # surely worse is no gain
        ([0.52, 0.55, 0.56], False),  # 0.51 to 0.61
    ],
)
def test_rounds_end_once_two_running_gain_nothing(
    shares: list[float], settled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        evaluation(i, {f"r{j}" if j else "sft": (share, 0.05) for j in range(i)})
        for i, share in enumerate(shares, 1)
    ]
    assert has_settled(read_rounds(folders)) == settled
    rounds.run([str(folder) for folder in folders])
    shown = capsys.readouterr()
    assert bool(shown.out) != settled
    assert ("the last 2 have gained nothing; the best policy is " in shown.err) == settled


def test_a_judge_that_was_asked_decides() -> None:
    """The newest reward model prefers the policy that was trained on it."""
    folders = [evaluation(1, {"sft": (0.9, 0.01)}, {"sft": (0.5, 0.1)})]
    folders += [evaluation(2, {"r1": (0.9, 0.01)}, {"r1": (0.4, 0.1)})]
    first, second = read_rounds(folders)
    assert (first.share, second.share, second.best) == (0.5, 0.4, "r1")
    assert has_settled([first, second])


def test_what_is_no_round_is_named() -> None:
    first, second = evaluation(1, {"sft": (0.7, 0.1)}), evaluation(2, {"sft": (0.7, 0.1)})
    with pytest.raises(UserError, match=r"round2/evaluate does not compare r2 with r1"):
        read_rounds([first, second])
    with pytest.raises(UserError, match=r"round3/evaluate is no finished evaluation"):
        read_rounds([first, evaluation(3, {}, complete=False)])
    manifest = json.loads((first / "stage.json").read_text())
    del manifest["parents"]["reference"]  # it is none, or lies on the hub
    (first / "stage.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="compares with no folder .*evaluate with reference=DIR"):
        read_rounds([first])
    with pytest.raises(UserError, match="elsewhere is no finished evaluation"):
        read_rounds([Path("elsewhere")])
    for words in ([], ["--all", "round1/evaluate"]):
        with pytest.raises(UserError, match=r"^rounds"):
            rounds.run(words)
