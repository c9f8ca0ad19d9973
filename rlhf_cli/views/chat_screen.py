"""How the answers of a dialogue are shown while they are made: lines, two columns, or JSON."""

import json
import shutil
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_cli.reporting.terminal import obeyed, on_one_line, printable

NARROWEST = 60  # columns of a terminal on which two answers stand side by side
FRAME = 3  # lines of a terminal beside those of the answers


@dataclass
class Answer:
    """What a policy said.

    finish_reason: eos, stop, length or interrupted.
    score: of `reward=`; None where there is none.
    """

    text: str
    finish_reason: str
    score: float | None


class Shown:
    """The answers to a message, one after the other, each as it comes: for terminals and pipes."""

    def __init__(self, several: bool) -> None:
        """`several`: whether each needs the name of who says it."""
        self._several, self._said = several, ""

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *error: object) -> None:
        """All answers are there, or one of them failed."""

    def begin(self, message: str, name: str) -> None:
        """A policy begins its answer."""
        self._said = ""
        if self._several:
            self._write(f"{on_one_line(name)}: ")

    def hear(self, text: str) -> None:
        """Its answer so far."""
        if text.startswith(self._said):  # else what was written is not taken back before the end
            self._write(text[len(self._said) :])
            self._said = text

    def end(self, answer: Answer, remarks: str) -> None:
        """Its whole answer."""
        self.hear(answer.text)
        told = f"\n[{remarks}]" if remarks else ""
        self._write(f"{told}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Beside(Shown):
    """Answers in columns beside each other, which stay as they are once all are there."""

    def __init__(self) -> None:
        super().__init__(several=True)
        self._console = Console(file=obeyed(sys.stdout), highlight=False, emoji=False)
        self._columns: list[tuple[str, str, str]] = []  # name, text, remarks
        self._live: Live | None = None

    def __enter__(self) -> Shown:
        self._columns = []
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._live is not None
        self._live.stop()
        if error[0] is None:
            self._console.print(self._table(None))

    def begin(self, message: str, name: str) -> None:
        """A column more."""
        self._columns.append((on_one_line(name), "", ""))

    def hear(self, text: str) -> None:
        """Of what is longer than the terminal the last lines are shown."""
        name, _, remarks = self._columns[-1]
        self._columns[-1] = name, text, remarks
        if self._live is not None:
            self._live.update(self._table(self._console.height - FRAME), refresh=True)

    def end(self, answer: Answer, remarks: str) -> None:
        """The column is whole."""
        self._columns[-1] = self._columns[-1][0], answer.text, remarks

    def _table(self, lines: int | None) -> Table:
        """The columns, each with its last so many lines."""
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        width = self._console.width // 2 - 2
        cells = []
        for name, text, remarks in self._columns:
            table.add_column(Text(name), ratio=1, overflow="fold")
            wrapped = Text(printable(text)).wrap(self._console, width)
            kept = Text("\n").join(wrapped if lines is None else wrapped[-max(lines, 1) :])
            cells.append(
                kept if not remarks else Text.assemble(kept, "\n", (f"[{remarks}]", "dim"))
            )
        if len(cells) == 1:  # the other one has not begun
            table.add_column(ratio=1)
        table.add_row(*cells)
        return table


class Objects(Shown):
    """A line of JSON for each answer, for programs."""

    def __init__(self) -> None:
        super().__init__(several=False)
        self._asked = ("", "")

    def begin(self, message: str, name: str) -> None:
        """Nothing is shown before the end."""
        self._asked = message, name

    def hear(self, text: str) -> None:
        """Nor here."""

    def end(self, answer: Answer, remarks: str) -> None:
        """The line."""
        message, name = self._asked
        said = {"policy": name, "prompt": message, "response": answer.text}
        more = {"reward": answer.score, "finish_reason": answer.finish_reason}
        self._write(json.dumps({**said, **more}) + "\n")


def shown_as(policies: int, as_json: bool) -> Shown:
    """How answers are best shown where standard output goes."""
    if as_json:
        return Objects()
    wide = shutil.get_terminal_size().columns >= NARROWEST
    return Beside() if policies > 1 and sys.stdout.isatty() and wide else Shown(policies > 1)
