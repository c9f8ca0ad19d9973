"""argv -> stage. The first word picks a stage or a command; Hydra composes what follows.

Every user error becomes one line on stderr: status 2 for a wrong command, config or input, 1 for a
run that failed, 75 where the same command is to be given again (a signal ended it, or another
process writes the folder), 130 where a second Ctrl-C did, 141 where the reader of standard output
has left. stdout carries the path of what a stage wrote, nothing else.
Hydra and torch are imported only by commands that need them, so help answers at once. What is
imported before `main` takes the signals is as little as can be.
"""

import os
import sys

from rlhf_cli import __version__
from rlhf_cli.commands import COMMANDS, SHORT
from rlhf_cli.config.errors import EXIT_TRY_AGAIN, Busy, Interrupted, RunError, UserError
from rlhf_cli.runs import interrupts

TYPE_CHECKING = False  # as type checkers read it; typing itself takes longer than all of this
if TYPE_CHECKING:
    from types import ModuleType, TracebackType

EXIT_READER_LEFT = 141  # as shells say of a tool that SIGPIPE ended
LONGEST_LINE = 1000  # characters of an error


def main() -> int:
    """Run the command in sys.argv and return its exit status. Signals are taken for good."""
    interrupts.take()
    open_closed_streams()
    let_threads_sleep()
    from rlhf_cli.reporting.terminal import show_controls

    show_controls()
    words = sys.argv[1:]  # Hydra writes its own there
    show_traceback = os.environ.get("RLHF_TRACEBACK") == "1"
    if show_traceback:
        sys.excepthook = _print_traceback
    try:
        if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
            _become_one_of_several()
        status = _dispatch(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        elif not _is_stage(words):  # a stage says itself what it could not say there
            return _fail("standard output is closed, so nothing is shown", 1)
        if (worker := _worker()) is not None:
            worker.leave(status)
        return status
    except BrokenPipeError:
        drop_stdout()  # its reader left, as `head` does
        return EXIT_READER_LEFT
    except Interrupted as error:
        if (worker := _worker()) is not None:
            worker.tell(str(error), EXIT_TRY_AGAIN)
            return EXIT_TRY_AGAIN
        from contextlib import suppress

        with suppress(OSError):  # a terminal or `tee` that the same signal ended
            print(f"rlhf-cli: {error}", file=sys.stderr, flush=True)
        return EXIT_TRY_AGAIN
    except KeyboardInterrupt:
        if show_traceback:
            raise
        return _fail("interrupted; the same command resumes", 130)
    except Exception as error:
        if show_traceback:
            if _worker() is not None:  # the one who started it knows of no traceback
                _fail(f"{type(error).__name__}: {error}", 1, error)
            raise
        _flush_or_drop()
        if isinstance(error, UserError):
            status = EXIT_TRY_AGAIN if isinstance(error, Busy) else 2
            return _fail(str(error), status, error)
        if isinstance(error, RunError):
            return _fail(str(error), 1, error)
        hint = "set RLHF_TRACEBACK=1 for the traceback"
        if isinstance(error, MemoryError):  # outside of a step, which would have said more
            return _fail(f"out of memory: {error} ({hint}; --check tells what fits)", 1, error)
        return _fail(f"{type(error).__name__}: {error} ({hint})", 1, error)


def open_closed_streams() -> None:
    """Put nothing in the place of standard streams that are closed.

    Else the first files that are opened get their numbers, and what a library writes to standard
    output or error lands in them. Python's own names for input and output stay None: whoever needs
    them says so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stderr is None:  # print(file=None) would write to standard output
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def let_threads_sleep() -> None:
    """Let threads that wait for each other sleep soon, unless the user set how they wait.

    OpenMP reads this as torch is imported. By default a thread that is done spins until the others
    are, for milliseconds, and on a busy machine takes from them the very core that they need. Small
    layers in two threads on two cores, steps a second alone and beside another such process: 460
    and 7 by default, 330 and 420 without any spinning, 360 to 550 and 240 with the few turns here.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "2000"  # GNU's, which most builds of torch bring along


def drop_stdout() -> None:
    """Let what is still to be written there vanish: Python flushes it at exit."""
    from contextlib import suppress

    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_or_drop() -> None:
    """Write what waits for standard output, which may itself be what failed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        drop_stdout()


def _is_stage(words: list[str]) -> bool:
    from rlhf_cli.config.stages import STAGES

    return bool(words) and words[0] in STAGES


def _become_one_of_several() -> None:
    """Where the environment says that this process is a rank of a run, be it."""
    from rlhf_cli.ranks import worker

    worker.become()
    if worker.is_one():
        interrupts.told_by(worker.tells_of_signal)


def _worker() -> "ModuleType | None":
    """What a process does that is one of several; None where it is alone."""
    worker = sys.modules.get("rlhf_cli.ranks.worker")
    return worker if worker is not None and worker.is_one() else None


def _fail(message: str, status: int, error: BaseException | None = None) -> int:
    from rlhf_cli.config.secrets import redacted

    line = redacted(" ".join(message.split()))
    if len(line) > LONGEST_LINE:  # some value in it is no more readable in full
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    if (worker := _worker()) is not None:
        worker.tell(line, status, error)
    else:
        print(f"rlhf-cli: error: {line}", file=sys.stderr)
    return status


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: "TracebackType | None"
) -> None:
    import traceback

    from rlhf_cli.config.secrets import redacted

    text = "".join(traceback.format_exception(kind, error, trace))
    print(redacted(text), end="", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        from rlhf_cli.commands.help import overview

        print(overview())
        return 0
    first, rest = words[0], words[1:]
    if first == "--version":
        print(f"rlhf-cli {__version__}")
        return 0
    from rlhf_cli.config.stages import STAGES

    if first in STAGES:
        from rlhf_cli.commands import stage

        stage.run(first, rest)
        return 0
    if first in COMMANDS:
        import importlib

        command = importlib.import_module(f"rlhf_cli.commands.{SHORT.get(first, first)}")
        command.run(rest)
        return 0
    from rlhf_cli.config.hints import nearest

    if "=" in first or first.startswith("-"):
        raise UserError(f"the stage comes first: rlhf-cli STAGE {first}; see rlhf-cli --help")
    choices = ", ".join([*STAGES, *COMMANDS])
    hint = nearest(first, [*STAGES, *COMMANDS])
    raise UserError(f"unknown stage {first}{hint or ';'} choices: {choices}")
