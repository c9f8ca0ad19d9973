"""The lower edge of a terminal, as a person sees it: on a pty whose screen is kept here."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from rlhf_cli.reporting.board import Board
from rlhf_cli.reporting.console import board, console

RUN = """
import os, signal, sys
from rlhf_cli.reporting.console import Bar, board, say
from rlhf_cli.runs import interrupts

interrupts.take()
board.job = "job 2 of 6"
course = board.begin("runs/x", "ppo")
interrupts.shown_by(board.tell_of_signal)
interrupts.wait_for_steps()

def wait():
    sys.stdin.readline()

with Bar("ppo", 3) as bar:
    for step in (1, 2, 3):
        bar.advance()
        if course:
            course.hear("metrics.jsonl", {"step": step, "reward": step / 2})
            row = {"step": step, "prompt": "Hello?", "response": f"answer {step}", "reward": 1}
            course.hear("samples.jsonl", row)
        if step == 1:
            say("said")
            print("printed")
            with Bar("inner", 2) as inner:
                inner.advance()
                wait()
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            wait()
say("the end")
"""


class Screen:
    """The lines of a terminal, by the few sequences that are sent to it."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
            self._obey(part)

    def _obey(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part[0] != "\x1b":
            line = self.lines[self.row].ljust(self.column)
            end = self.column + len(part)
            self.lines[self.row] = line[: self.column] + part + line[end:]
            self.column = end
        elif part[-1] == "A":
            self.row -= int(part[2:-1])
            assert self.row >= 0, "above the first line"
        elif part[-1] == "K":
            assert part == "\x1b[2K"
            self.lines[self.row] = ""
        else:
            assert part[-1] in "mhl", part


class Terminal:
    """A process on a terminal, and what that shows."""

    def __init__(self, code: str, **env: str) -> None:
        self.screen, self._raw = Screen(), ""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", **env},
            text=True,
        )
        os.close(theirs)

    def key(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def until(self, *words: str, seconds: float = 60.0) -> str:
        """All lines, once these words are among them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    self._read()
                except OSError:  # the process is gone
                    break
            if all(word in "\n".join(self.screen.lines) for word in words):
                break
        text = "\n".join(self.screen.lines)
        assert all(word in text for word in words), text
        return text

    def _read(self) -> None:
        self._raw += os.read(self._ours, 65536).decode(errors="ignore")
        begun = re.search(r"\x1b(\[[?\d;]*)?$", self._raw)  # the rest of it is on its way
        whole = begun.start() if begun else len(self._raw)
        self.screen.feed(self._raw[:whole])
        self._raw = self._raw[whole:]


def test_a_run_on_a_terminal() -> None:
    run = Terminal(RUN)
    shown = run.until("inner  ", "reward", "answer 1")
    assert shown.index("said") < shown.index("printed") < shown.index("runs/x, job 2 of 6")
    assert shown.index("ppo  ━") < shown.index("inner  ━") < shown.index("reward")
    assert "0.5 → 0.5" in shown
    run.key()
    shown = run.until("SIGINT: this step is finished", "answer 2")
    assert "step 1" in shown and "answer 1" in shown  # its first answer beside it
    assert shown.count("ppo  ━") == 1 and "inner  " not in shown
    time.sleep(0.5)  # it is drawn again meanwhile, in the same place
    assert run.until("SIGINT").count("SIGINT") == 1
    run.key()
    shown = run.until("the end")
    assert [line for line in shown.splitlines() if line][-3:] == [
        "SIGINT: this step is finished and saved first; another Ctrl-C ends at once",
        "reward  ▁▅█                                               0.5 → 1.5",
        "the end",
    ]
    assert run.process.wait(10) == 0


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_where_nobody_looks_on_there_are_plain_lines(name: str, value: str) -> None:
    run = Terminal(RUN, **{name: value})
    run.key()
    run.key()
    shown = run.until("the end")
    assert [line for line in shown.splitlines() if line] == [
        "said",
        "printed",
        "SIGINT: this step is finished and saved first; another Ctrl-C ends at once",
        "the end",
    ]


def test_a_terminal_that_breaks_lines_has_the_last_frame_further_up() -> None:
    from rlhf_cli.reporting.board import _Edge

    edge = _Edge(console, lambda: pytest.fail("nothing is drawn"))
    edge._frame.shape = (120, [119, 30, 0, 61])
    width, console.width = console.width, 60
    try:
        first, *_ = edge.process_renderables([])
        ups = str(first).count("\x1b[1A")
    finally:
        console.width = width
    assert ups == 1 + 0 + 0 + 1


def test_bars_tell_who_asks_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.reporting.console import Bar

    heard: list[list[str]] = []
    monkeypatch.setattr(
        board, "heard_by", lambda bars: heard.append([f"{b.activity} {b.done}" for b in bars])
    )
    with Bar("outer", 2) as outer:
        outer.advance()
        with Bar("inner", 1) as inner:
            inner.advance()
        outer.advance()
    assert heard == [["outer 1"], ["outer 1", "inner 1"], ["outer 2"]]


def test_no_file_is_a_terminal_whatever_colours_it_gets(tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "log").open("w") as log:
        ours = Board(Console(file=log, force_terminal=True))
        assert not ours.is_live() and ours.begin("x", "ppo") is None and not ours.shows_samples()
