"""How far shared work is, as a rank can tell by its own part."""

from collections.abc import Callable


class Share:
    """A bar of all that ranks share, which is told of as if the others were as far as this one."""

    def __init__(self, advance: Callable[[int], None], total: int, own: int) -> None:
        """`advance` is told how many more are done; of the total so many are this rank's own."""
        self._advance, self._total, self._own = advance, total, own
        self._done = self._told = 0

    def advance(self, count: int) -> None:
        """So many more of this rank's own are done."""
        self._done = min(self._done + count, self._own)  # work may be done again
        self._tell(self._total * self._done // self._own)

    def finish(self) -> None:
        """All are."""
        self._tell(self._total)

    def _tell(self, upto: int) -> None:
        self._advance(upto - self._told)
        self._told = upto
