"""What judges have said and cost, on disk: verdicts for every run, and what a run has paid."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rlhf_cli.data.held_out import hash_of
from rlhf_cli.folders.journal import Journal

TOKENS = ("prompt_tokens", "completion_tokens")


def name_of(question: str) -> str:
    """What a question is known by: it holds the template, a principle, both texts, their order."""
    return f"{hash_of(question):016x}"


class Verdicts:
    """The log-odds of each question that a judge has answered, for every run that asks it."""

    def __init__(self, file: Path) -> None:
        self._journal = Journal(file)
        self._known: dict[str, float] | None = None  # read once it is asked for

    def of(self, names: Iterable[str]) -> dict[str, float]:
        """Those that are known."""
        known = self._read()
        return {name: known[name] for name in names if name in known}

    def _read(self) -> dict[str, float]:
        if self._known is None:
            blocks = self._journal.blocks()
            self._known = {each["ask"]: each["log_odds"] for block in blocks for each in block}
        return self._known

    def keep(self, found: Mapping[str, float]) -> None:
        """Write some more down."""
        self._read().update(found)
        self._journal.file.parent.mkdir(parents=True, exist_ok=True)
        self._journal.append([{"ask": name, "log_odds": odds} for name, odds in found.items()])


class Spending:
    """What a run has asked a judge in all its starts; may be told by many threads at once.

    counts: calls, cached, prompt_tokens, completion_tokens.
    """

    def __init__(
        self,
        file: Path,
        prices: Sequence[float] = (),
        most: float | None = None,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Of a run, with what its earlier starts have paid.

        Args:
            file: of the run.
            prices: of a million tokens read and a million written.
            most: that it may pay.
            before_write: raises where the file is no longer this run's to write.
        """
        self._journal = Journal(file, before_write)
        self._prices, self.most = prices, most
        self._guard = threading.Lock()
        self._asked: set[str] = set()
        self.counts: Counter[str] = Counter()
        for block in self._journal.blocks():
            for call in block:
                self._count(call["ask"], [call[name] for name in TOKENS])

    def _count(self, ask: str, tokens: Sequence[int]) -> None:
        self._asked.add(ask)
        self.counts["calls"] += 1
        for name, count in zip(TOKENS, tokens, strict=True):
            self.counts[name] += count

    def add(self, calls: Mapping[str, Sequence[int]]) -> None:
        """Write calls down.

        Args:
            calls: by the name of the question the tokens that were read and written.
        """
        with self._guard:
            self._journal.file.parent.mkdir(parents=True, exist_ok=True)
            self._journal.append(
                [
                    {"ask": ask, **dict(zip(TOKENS, tokens, strict=True))}
                    for ask, tokens in calls.items()
                ]
            )
            for ask, tokens in calls.items():
                self._count(ask, tokens)

    def count_cached(self, names: Iterable[str]) -> None:
        """Count the questions among these that other runs have paid for."""
        self.counts["cached"] += sum(name not in self._asked for name in names)

    @property
    def is_spent(self) -> bool:
        """Whether the run may pay no more."""
        with self._guard:
            return self.most is not None and price_of(self.counts, self._prices) >= self.most


def price_of(counts: Mapping[str, int], prices: Sequence[float]) -> float:
    """What was read and written costs, at prices of a million tokens of each."""
    read, written = (counts.get(name, 0) for name in TOKENS)
    return (read * prices[0] + written * prices[1]) / 1e6
