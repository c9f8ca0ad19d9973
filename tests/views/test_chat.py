"""A dialogue: what policies read of it, what is shown and kept, on a terminal and from a pipe."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf_cli.commands.chat import config_of, parse, run
from rlhf_cli.config.errors import UserError
from rlhf_cli.views.chat import Chat, Exchange
from rlhf_cli.views.chat_screen import Answer, Beside, Objects, Shown
from rlhf_cli.views.speaker import Speaker, settled
from tests.toys import bpe, llama

BELL = "\x1b]0;title\x07"  # what a terminal obeys


class Echo:
    """A policy that repeats what it reads, of two exchanges at most."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.temperatures: list[float] = []

    def reads(
        self, system: str, told: Sequence[Exchange], place: int, message: str
    ) -> "Read | None":
        if len(message) > 20:
            return None
        seen = told[-2:]
        texts = [system, *(each.answers[place].text for each in seen), message]
        return Read("|".join(texts), len(told) - len(seen))

    def answers(self, known: "Read", temperature: float, heard: Callable[[str], None]) -> Answer:
        self.temperatures.append(temperature)
        heard(known.text[:2])
        return Answer(known.text, "length", 0.5)


class Read:
    """What it reads."""

    def __init__(self, text: str, left_out: int) -> None:
        self.text, self.left_out = text, left_out


def test_messages_and_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    voices = [Echo("a"), Echo("b")]
    chat = Chat(voices, Shown(several=True), 1.0)
    for line in ("x", " /bye", "/undo", "/again", "/temperature 0.5", "/system S", "z", ""):
        assert chat.take(line)
    out, said = capfd.readouterr()
    assert out.startswith("a: |x\n[reward 0.5, cut at its longest]\nb: |x\n")
    assert [each.message for each in chat.told] == ["x", "z"]
    assert [each.answers[1].text for each in chat.told] == ["|x", "S||x|z"]
    assert voices[0].temperatures == [1.0, 1.0, 1.0, 0.5]
    assert said.splitlines() == [
        "taken back: /bye",
        "temperature 0.5",
        "the system prompt is set",
    ]
    file = tmp_path / "rows.jsonl"
    for line in (f"/save {file}", f"/save {file}", "/what", "/temperature -1", "/new", "/again"):
        assert chat.take(line)
    assert not chat.take("/bye")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["a", "b"] and rows[0]["rewards"] == [0.5, 0.5]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [turn["role"] for turn in rows[0]["messages"]] == roles
    assert capfd.readouterr().err.splitlines() == [
        f"saved: {file}",
        f"{file} exists; name another file",
        "no command /what; /help names them; a blank before / makes it a message",
        "/temperature takes a number from 0 up, got -1",
        "all that was said is forgotten",
        "nothing was said yet",
    ]


def test_a_dialogue_is_saved_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", 'pass"word')
    chat = Chat([Echo()], Shown(several=False), 1.0)
    for line in ('is it pass"word?', f"/save {tmp_path}/rows.jsonl"):
        assert chat.take(line)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["messages"][0]["content"] == "is it [DB_PASSWORD]?"


def test_what_no_longer_fits_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    chat = Chat([Echo()], Shown(several=False), 1.0)
    for line in ("1", "2", "3", "4", "5" * 21, "/again"):
        chat.take(line)
    assert len(chat.told) == 4  # what was too long left nothing, and took nothing away
    assert capfd.readouterr().err.splitlines() == [
        "note: a no longer sees the first 1 exchanges",
        "too long: this does not fit a beside an answer; say it shorter",
    ]


@pytest.mark.parametrize("fault", [UserError("gone"), KeyboardInterrupt()])
def test_again_keeps_the_answers_that_there_were(fault: BaseException) -> None:
    class Broken(Echo):
        def answers(self, known: Read, temperature: float, heard: Callable[[str], None]) -> Answer:
            if self.temperatures:
                raise fault
            return super().answers(known, temperature, heard)

    chat = Chat([Broken()], Shown(several=False), 1.0)
    chat.take("x")
    assert chat.take("/again")
    assert [each.answers[0].text for each in chat.told] == ["|x"]


def test_columns_and_objects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = f"{BELL}[bold]not markup[/bold] " + "word " * 12
    for shown in (Beside(), Objects()):
        with shown:
            for name in ("runs/a", "runs/b"):
                shown.begin("asked", name)
                shown.hear(text[:5])
                shown.end(Answer(text, "eos", None), "")
    columns, *objects = capsys.readouterr().out.rsplit("\n", 3)
    lines = columns.splitlines()
    assert "runs/a" in lines[-4] and lines[-4].index("runs/b") > 35
    assert lines[-3].count("[bold]not") == 2 and "\x1b]0" not in columns
    found = [json.loads(line) for line in objects if line]
    assert [each["policy"] for each in found] == ["runs/a", "runs/b"]
    assert found[0]["response"] == text and found[0]["finish_reason"] == "eos"


def test_a_job_of_a_sweep_is_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("sweep/lr=0.1_seed=1"), chat=True)
    (policy,) = parse(["sweep/lr=0.1_seed=1", "seed=3"]).policies
    assert config_of(policy, ["seed=3"]).policy == "sweep/lr=0.1_seed=1"


def test_words() -> None:
    order = parse(["a", "b", "system=Be kind", "algo.temperature=0", "--json"])
    assert order.policies == ["a", "b"] and order.system == "Be kind" and order.json
    assert order.overrides == ["algo.temperature=0"]
    for wrong, line in (
        ([], "chat takes a policy"),
        (["a", "b", "c"], "one policy or two"),
        (["a", "--x"], "unknown flag --x"),
        (["a", "algo.beams=2"], "nothing here reads algo.beams"),
        (["a", "algo.temprature=2"], "did you mean algo.temperature"),
    ):
        with pytest.raises(UserError, match=line):
            parse(wrong)


def test_what_may_still_go_is_not_shown() -> None:
    assert settled("Hi\ufffd", []) == "Hi"
    assert settled("Hi\nUs", ["\nUser:"]) == "Hi"
    assert settled("Hi\nUser: x", ["\nUser:"]) == "Hi"
    assert settled("Hi\nThen", ["\nUser:"]) == "Hi\nThen"


def folder(place: Path, chat: bool) -> Path:
    """A random model, with a chat template or without any."""
    tokenizer = bpe(chat=chat)
    model = llama(len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("chats", [True, False])
def test_what_a_policy_reads_and_says(chats: bool, tmp_path: Path) -> None:
    cfg = config_of(
        str(folder(tmp_path, chats)),
        ["algo.max_tokens=6", "reward=length:4", "data.max_prompt_tokens=60"],
    )
    speaker = Speaker("it", cfg)
    told = [Exchange("Hi", [Answer("Yes", "eos", None)])]
    known = speaker.reads("Be kind", told, 0, "Who?")
    assert known is not None and known.left_out == 0
    text = str(speaker._encoder.tokenizer.decode(known.prompt[1]))
    for each in ("Be kind", "Hi", "Yes", "Who?"):
        assert each in text
    assert ("system" in text) == chats
    if not chats:
        assert text.endswith("Be kind\nHiYes\nWho?")
    heard: list[str] = []
    first = speaker.answers(known, 1.0, heard.append)
    assert first.text.startswith(heard[0]) and first.score is not None
    assert speaker.answers(known, 1.0, heard.append).text != first.text
    greedy = [speaker.answers(known, 0.0, heard.append).text for _ in range(2)]
    assert greedy[0] == greedy[1]
    cut = speaker.reads("", told * 40, 0, "Who?")
    assert cut is not None and 0 < cut.left_out < 40
    assert speaker.reads("", [], 0, "Who? " * 60) is None

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    assert speaker.answers(known, 1.0, interrupt).finish_reason == "interrupted"


def test_from_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = folder(tmp_path / "it", chat=True)
    piped = io.BytesIO(b"Hi\n\n\xff\x1b[2J\n/bye\nno\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped, encoding="utf-8"))
    run([str(place), str(place), "--json", "algo.max_tokens=4", "reward=length:4"])
    said, told = capfd.readouterr()
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hi", "Hi", "\ufffd\\x1b[2J", "\ufffd\\x1b[2J"]
    assert rows[0]["response"] == rows[1]["response"]  # one policy, one seed
    assert all(isinstance(row["reward"], float) for row in rows)
    assert "prompts by its chat template" in told


@pytest.mark.slow
def test_ctrl_c_ends_a_dialogue_that_is_piped(tmp_path: Path) -> None:
    """Also between two messages, where nobody is asked for the next one."""
    folder(tmp_path / "it", chat=True)
    words = [sys.executable, "-m", "rlhf_cli", "chat", "it", "algo.max_tokens=4"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, cwd=tmp_path, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    ) as talk:
        assert talk.stdin and talk.stdout and talk.stderr
        talk.stdin.write("Hi\n")
        talk.stdin.flush()
        talk.stdout.readline()  # an answer is there
        talk.send_signal(signal.SIGINT)
        assert talk.wait(60) == 75
        assert talk.stderr.read().splitlines()[-1] == (
            "rlhf-cli: interrupted by SIGINT; run the same command again"
        )


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path) -> None:
    folder(tmp_path / "it", chat=True)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ |= {"COLUMNS": "80", "TERM": "xterm"}
        os.execv(
            Path(sys.executable).parent / "rlhf-cli",
            ["rlhf-cli", "chat", "it", "it", "algo.max_tokens=4"],
        )
    seen = ""

    def until(*marks: str) -> None:
        """One after the other: before a prompt is there a key means something else."""
        nonlocal seen
        start, end = len(seen), time.monotonic() + 240
        for mark in marks:
            while mark not in seen[start:]:
                assert time.monotonic() < end, seen
                if select.select([terminal], [], [], 5)[0]:
                    seen += os.read(terminal, 4096).decode(errors="replace")
                elif mark == "Ctrl-D ends":
                    os.write(terminal, b"\x03")  # the one before came as an answer ended
            start = seen.index(mark, start) + len(mark)

    prompt = "\r\n> "
    until(prompt)
    for line, marks in (
        ("Hi\n", [prompt]),
        ("\x03", ["Ctrl-D ends", prompt]),
        ("/undo\n", ["taken back: Hi", prompt]),
    ):
        os.write(terminal, line.encode())
        until(*marks)
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    heads = [line for line in seen.splitlines() if line.count("it") == 2]
    assert heads, "both stand beside each other"
