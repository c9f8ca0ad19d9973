"""Rounds of online RLHF, as their evaluations tell them: is another one worth its labels?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.folders.manifest import read_manifest

PATIENCE = 2  # rounds running that gain nothing, after which another is not worth its labels


@dataclass
class Round:
    """A round, by what evaluate says of its policy beside the policies before it.

    before: the policy of the round before; of the first round the reference, which is SFT.
    share: of wins over that, with half the ties; low, high: its 95% interval.
    best: the policy that won most of all policies so far, each round's against the best before it.
    """

    policy: str
    before: str
    share: float
    low: float
    high: float
    best: str

    @property
    def gains(self) -> bool:
        """Whether it is surely better than the round before."""
        return self.low > 0.5


def read_rounds(folders: Sequence[Path]) -> list[Round]:
    """Rounds by the folders of their evaluations, oldest first.

    Wins are those that the judge tells where one was asked, else those by gold or reward.

    Raises:
        UserError: a folder is no finished evaluation, or one lacks the policy of a round before.
    """
    rounds: list[Round] = []
    for folder in folders:
        reference, policy, wins = _read(folder)
        before, best = (rounds[-1].policy, rounds[-1].best) if rounds else (reference, reference)
        for other in (before, best):
            if other not in wins:
                raise UserError(f"{folder} does not compare {policy} with {other}: give baselines")
        over = wins[before]
        new_best = policy if share_of(wins[best]) >= 0.5 else best
        rounds.append(Round(policy, before, share_of(over), over["low"], over["high"], new_best))
    return rounds


def has_settled(rounds: Sequence[Round]) -> bool:
    """Whether the last rounds have gained nothing, each over the one before."""
    return len(rounds) >= PATIENCE and not any(each.gains for each in rounds[-PATIENCE:])


def share_of(rate: dict[str, float]) -> float:
    """Wins and half the ties."""
    return rate["win"] + rate["tie"] / 2


def _read(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """The reference of an evaluation, the policy that it judges, and its wins over each other."""
    manifest = read_manifest(folder) or {}
    if not manifest.get("complete") or manifest.get("kind") != "report":
        raise UserError(f"{folder} is no finished evaluation: rlhf-cli evaluate makes one")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    reference = manifest["parents"].get("reference", {}).get("path")
    if reference is None:
        raise UserError(
            f"{folder} compares with no folder that rounds start from: evaluate with reference=DIR"
        )
    wins: dict[str, Any] = report.get("judge", report)["win_rates"]
    return str(Path(reference)), next(iter(report["policies"])), wins
