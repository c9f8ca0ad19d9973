"""SIGTERM, SIGHUP and SIGINT: a training step that is under way is finished and saved first.

Schedulers and CI send SIGTERM some time before they kill, a terminal that closes SIGHUP, people
press Ctrl-C. All end the run with status 75, upon which a queue runs the same command again. A
second Ctrl-C ends it at once.

Before the first step there is nothing to finish, and the process ends where it is. An exception
would not do: within an import, a destructor or a library's callback it becomes another one, is
printed and forgotten, or aborts. What is on disk is whole at any moment, as after a SIGKILL.

The command line takes the signals before it imports anything, so this module imports next to
nothing itself.
"""

from __future__ import annotations

import atexit
import os
import select
import signal

from rlhf_cli.config.errors import EXIT_TRY_AGAIN, Interrupted

TYPE_CHECKING = False  # as type checkers read it; typing itself takes longer than the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

EXIT_AT_ONCE = 130
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class _Stop:
    """waits: a step is under way, whose end is waited for. asked: the signal that came.

    taken: the signals that are ours; one that is ignored, as SIGHUP under nohup, stays so.
    passed_on: takes signals for the processes that this one waits for.
    told_by, shown_by: take lines, with the exit status of one that is the last, and return whether
        they have.
    process: whose they are. acts: what is done before the process ends where it is.
    """

    waits = False
    asked: str | None = None
    taken: tuple[signal.Signals, ...] = ()
    passed_on: Callable[[int], object] | None = None
    told_by: Callable[[str, int | None], bool] | None = None
    shown_by: Callable[[str, int | None], bool] | None = None
    process = 0
    acts: list[Callable[[], object]] = []


def take() -> None:
    """From now on until the process is gone, signals end it with 75."""
    if _Stop.process == os.getpid():
        return
    _Stop.process = os.getpid()
    _Stop.taken = tuple(each for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN)
    for number in _Stop.taken:
        signal.signal(number, _on_signal)
    atexit.register(_ignore)  # called last, as the first that was registered


def wait_for_steps() -> None:
    """From now on a signal only asks: the stage looks after each step."""
    _Stop.waits = True


def wait_no_more(done: str) -> None:
    """From now on a signal ends the process where it is again, as before the first step.

    Raises:
        Interrupted: a signal asked for the end meanwhile; `done` says what is.
    """
    _Stop.waits = False
    if _Stop.asked is not None:
        raise Interrupted(f"{_Stop.asked}: {done}; the same command goes on")


def pass_on(send: Callable[[int], object] | None) -> None:
    """From now on signals are for processes that this one has started and waits for; None ends it.

    A second Ctrl-C ends this one at once, and with it the others.
    """
    _Stop.passed_on = send


def told_by(tell: Callable[[str, int | None], bool]) -> None:
    """Let somebody else say what signals do, where it returns that it has."""
    _Stop.told_by = tell


def shown_by(show: Callable[[str, int | None], bool]) -> None:
    """Let what draws on the terminal show what signals do: a line written past it is drawn over."""
    _Stop.shown_by = show


def asked() -> str | None:
    """The name of the signal that asked for an end, this process or another rank; None if none did.

    All ranks ask at the same place, and get the same answer.
    """
    from rlhf_cli.ranks.world import world

    if not world().any(_Stop.asked is not None):
        return None
    return next(each.name for each in _SIGNALS if world().any(_Stop.asked == each.name))


def before_the_end(act: Callable[[], object]) -> Callable[[], object]:
    """Call this, too, where a signal ends the process at once."""
    _Stop.acts.append(act)
    return act


def _ignore() -> None:
    """While the interpreter is taken down Python handles no signal; the status stands by then."""
    if _Stop.process == os.getpid():
        for number in _Stop.taken:
            signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Stop.process != os.getpid():
        _in_a_fork(number)
        return
    name = signal.Signals(number).name
    if _Stop.asked is not None:
        if number == signal.SIGINT:
            if _Stop.passed_on is not None:
                _Stop.passed_on(number)
            _end("ended at once; what was saved before is whole", EXIT_AT_ONCE)
        return
    _Stop.asked = name
    if _Stop.passed_on is not None:
        _Stop.passed_on(number)
        _tell(f"{name}: a step that is under way is finished and saved first; Ctrl-C ends at once")
        return
    if not _Stop.waits:
        _end(f"rlhf-cli: interrupted by {name}; run the same command again", EXIT_TRY_AGAIN)
    again = "another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
    _tell(f"{name}: this step is finished and saved first; {again} ends at once")


def _in_a_fork(number: int) -> None:
    """In a worker that a user's function or a library forked off.

    A terminal sends what it sends to all alike, and the step that is finished needs its workers;
    SIGTERM is how a pool ends them.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _end(line: str, status: int) -> None:
    for act in _Stop.acts:
        try:
            act()
        except OSError:  # a disk that is read-only now
            continue
    _tell(line, status)
    os._exit(status)


def _tell(line: str, status: int | None = None) -> None:
    """A line on stderr, past whatever was begun there, if somebody takes it: none is waited for."""
    for takes in (_Stop.shown_by, _Stop.told_by):
        if takes is not None and takes(line, status):
            return
    begun = f"{SHOW_CURSOR}\n" if os.isatty(2) else ""
    try:
        if select.select((), (2,), (), 0)[1]:
            os.write(2, f"{begun}{line}\n".encode())
    except OSError:  # nobody is there any more
        return
