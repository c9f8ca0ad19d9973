"""What is seen of a run in its folder: while it goes on, once it has ended, once it has died."""

import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli.commands import watch as command
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.reporting.live import Progress
from rlhf_cli.runs.lineage import HashOf, Node, read_node
from rlhf_cli.runs.lock import LOCK
from rlhf_cli.runs.out_files import PROGRESS
from rlhf_cli.runs.progress_file import EVERY, ProgressFile, read_progress
from rlhf_cli.views import watch
from rlhf_cli.views.watch import Tail, Watch, ago

BAR = Progress("ppo", 50, done=10, seconds=20.0)
OLD = time.time() - 3600


def append(file: Path, *rows: object) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Let a folder seem to be in a state, which else its lock and stage.json say."""
    states: dict[Path, str] = {}

    def read(folder: Path, hash_of: HashOf) -> Node:
        node = read_node(folder, hash_of)
        node.state = states.get(folder, node.state)
        return node

    monkeypatch.setattr(watch, "read_node", read)
    return states.__setitem__


def a_run(folder: Path, age: float = 0.0) -> Path:
    """An unfinished run of ppo on another machine, which wrote so many seconds ago."""
    (folder / "checkpoints/step-00000008").mkdir(parents=True)
    (folder / "config.yaml").write_text("# rlhf-cli ppo algo=ppo_ptx\nseed: 0\n")
    (folder / LOCK).write_text("process 7 on elsewhere")
    append(folder / "metrics.jsonl", *({"step": i, "reward": i / 2} for i in (1, 2)))
    sample = {"prompt": "Hi?", "response": "Yes.", "reward": 1.0}
    append(folder / "samples.jsonl", {"step": 1, **sample}, {"step": 2, **sample})
    ProgressFile(folder)([BAR])
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", PROGRESS):
        os.utime(folder / name, (time.time() - age,) * 2)
    return folder


def text(seen: Watch, width: int = 79, height: int = 30) -> str:
    return "\n".join(line.plain for line in seen.lines(width, height))


def test_a_run_that_goes_on_is_read_as_it_writes(
    tmp_path: Path, running: Callable[[Path, str], None]
) -> None:
    folder = a_run(tmp_path / "ppo")
    running(folder, "running (process 1 on a)")
    seen = Watch([folder])
    assert seen.goes_on
    first = text(seen)
    assert f"{folder}, ppo: running (process 1 on a)" in first.replace("\n", " ")
    assert "10/50" in first and "1:20 left" in first and "0.5 → 1" in first
    append(folder / "metrics.jsonl", {"step": 3, "reward": 9.0})
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')  # as it is being written
    seen.look()
    assert "0.5 → 9" in text(seen)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('ard": 7.0}\n')
    seen.look()
    assert "0.5 → 7" in text(seen)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 3.0}\n')  # cut back, to go on
    seen.look()
    assert "3 → 3" in text(seen) and "step 2, reward 1" in text(seen)


def test_a_run_that_died_says_when_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path / "ppo", age=3600)
    with pytest.raises(RunError, match=r"unfinished at step 8; no process has it, and it last"):
        command.run([str(folder)])
    out = capsys.readouterr().out
    assert "the same command goes on: rlhf-cli ppo algo=ppo_ptx" in out
    assert "reward" in out and "0.5 → 1" in out and "10/50" not in out


def test_a_run_on_another_machine_seems_to_go_on_while_it_writes(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "ppo", age=5)
    assert "ppo: running (process 7 on elsewhere, which wrote 5 s ago)" in text(
        Watch([folder]), 200
    )
    os.utime(folder / "metrics.jsonl", (OLD, OLD))
    assert Watch([folder]).goes_on  # by the others
    slow = Progress("ppo", 50, done=2, seconds=1200.0)  # ten minutes a step
    (folder / PROGRESS).unlink()
    ProgressFile(folder)([slow])
    for file in (folder / "config.yaml", folder / "samples.jsonl", folder / PROGRESS):
        os.utime(file, (time.time() - 1000,) * 2)
    assert Watch([folder]).goes_on
    os.utime(folder / PROGRESS, (OLD, OLD))
    os.utime(folder / "config.yaml", (OLD, OLD))
    os.utime(folder / "samples.jsonl", (OLD, OLD))
    assert not Watch([folder]).goes_on


def test_a_process_of_this_machine_that_was_killed_is_known_to_be_gone(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "ppo")
    (folder / LOCK).write_text(f"process 7 on {socket.gethostname()}")
    assert not Watch([folder]).goes_on
    (folder / LOCK).unlink()  # as it is where a signal has ended it
    assert not Watch([folder]).goes_on


def test_finished_runs_are_listed_in_the_order_of_the_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage, metric in (("ppo", "reward"), ("sft", "eval/loss"), ("evaluate", "gold")):
        said = {"stage": stage, "kind": "policy", "complete": True, "seconds": 63.2}
        folder = a_run(Path("runs/demo", stage))
        (folder / "stage.json").write_text(json.dumps({**said, "metrics": {metric: 0.5}}))
    command.run(["runs/demo"])
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["3", "runs", "in", "runs/demo"],
        ["run", "stage", "state", "done", "left", "figure"],
        ["sft", "sft", "finished", "-", "-", "eval/loss", "0.5"],
        ["ppo", "ppo", "finished", "-", "-", "reward", "1"],
        ["evaluate", "evaluate", "finished", "-", "-", "-"],
    ]
    command.run(["runs/demo/sft"])
    out = capsys.readouterr().out
    assert out.startswith("runs/demo/sft, sft: finished in 1:03\neval/loss 0.5\n")


def test_a_run_that_is_named_twice_or_from_elsewhere_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        folder = a_run(tmp_path / "runs" / name)
        said = {"stage": "ppo", "kind": "policy", "complete": True}
        (folder / "stage.json").write_text(json.dumps(said))
    monkeypatch.chdir(tmp_path)
    for words in (["runs", "runs/a"], [f"{tmp_path}/runs/a", "runs/b", "runs/../runs/a"]):
        command.run(words)
        title, _, *rows = capsys.readouterr().out.splitlines()
        assert title == "2 runs in runs" and [row.split()[0] for row in rows] == ["a", "b"]
    monkeypatch.chdir(tmp_path / "runs")
    command.run(["a", "b"])
    assert capsys.readouterr().out.startswith("2 runs in .\n")


def test_a_list_fits_and_keeps_those_that_go_on(tmp_path: Path) -> None:
    for i in range(30):
        a_run(tmp_path / f"seed={i}", age=10 if i == 17 else 3600 + i)
    seen = Watch([tmp_path])
    for width, height in ((79, 24), (30, 24), (120, 6), (20, 3)):
        lines = seen.lines(width, height)
        assert len(lines) <= height
        assert max(line.cell_len for line in lines) <= width
    shown = text(seen, 79, 24)
    assert shown.startswith("30 runs in ")
    assert "seed=17  ppo    running" in shown and "and 18 more" in shown
    assert "10/50  2.0 s each" in shown  # and beneath the list how far it is


def test_the_middle_of_a_large_log_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    append(file, *({"step": i, "text": "x" * 50} for i in range(1000)))
    tail = Tail(file, most=1000)
    steps = [row["step"] for row in tail.new()[1]]
    assert steps[0] == 0 and steps[-1] == 999 and len(steps) < 40
    append(file, {"step": 1000})
    assert tail.new() == (False, [{"step": 1000}])
    assert Tail(tmp_path / "none").new() == (False, [])


def test_progress_that_is_damaged_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / PROGRESS
    file.parent.mkdir()
    for content in ("", "[", "{}", "[1]", '[{"activity": "a"}]', "[[]]"):
        file.write_text(content)
        told = read_progress(tmp_path)
        assert told is None or told.bars == []
    ProgressFile(tmp_path)([BAR])
    told = read_progress(tmp_path)
    assert told is not None and told.bars == [BAR]


def test_progress_is_written_now_and_then_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ProgressFile(tmp_path)
    write([BAR])  # there is no such folder
    (tmp_path / PROGRESS).parent.mkdir()
    write([BAR])  # too soon
    assert not (tmp_path / PROGRESS).exists()
    write._written -= EVERY
    write([BAR])
    assert (tmp_path / PROGRESS).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "takes the folder of a run"),
        (["--follow", "x"], "unknown flag --follow"),
        (["absent"], "no folder absent"),
        (["."], "no run in ."),
    ],
)
def test_wrong_words(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        command.run(words)


def test_on_a_terminal_it_has_a_page_of_its_own_until_one_leaves(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "ppo")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rlhf_cli", "watch", str(folder)]
    env = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = ""
    while select.select([ours], [], [], 60)[0]:
        try:
            shown += os.read(ours, 65536).decode(errors="ignore")
        except OSError:  # it has ended
            break
        if "0.5 → 1" in shown and "page left" not in shown:
            process.send_signal(signal.SIGINT)
            shown += "page left"
    page, _, after = shown.partition("page left")
    assert process.wait(10) == 0, after
    assert page.startswith("\x1b[?1049h") and "10/50" in page
    _, there, below = after.partition("\x1b[?1049l")
    assert there and "\x1b[?25h" in after and "interrupted" not in after
    assert "0.5 → 1" in below  # what was seen last stays


@pytest.mark.parametrize(("named", "waits"), [(["a", "b"], False), (["a"], False), (["."], True)])
def test_it_ends_with_the_runs_that_are_named(
    named: list[str],
    waits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: Callable[[Path, str], None],
) -> None:
    """In a folder of runs the next one may be yet to begin."""
    monkeypatch.chdir(tmp_path)
    inside = a_run(Path("a/reward"))  # as a run keeps a model that it refreshes
    for folder in (a_run(Path("a")), a_run(Path("b"))):
        (folder / LOCK).unlink()
    (inside / LOCK).unlink()
    seen, times = Watch(list(map(Path, named))), []
    monkeypatch.setattr(command, "BETWEEN", 0.05)
    monkeypatch.setattr(command, "DRAWN", 0.01)
    command.follow(seen, lambda: times.append(1), [])
    assert (len(times) > 1) == waits
    console = Console(width=79, height=20, file=io.StringIO())
    console.print(command.Picture(seen))
    assert ("none goes on" in console.file.getvalue()) == waits  # type: ignore[attr-defined]


def test_ages_in_words() -> None:
    ages = [ago(each) for each in (3, 90, 150, 3 * 3600, 3 * 86400)]
    assert ages == ["3 s ago", "90 s ago", "2 min ago", "3 h ago", "3 days ago"]
