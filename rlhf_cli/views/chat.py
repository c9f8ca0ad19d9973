"""A dialogue with one policy or two: what is said, and what may be done to it."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import redacted_within
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.terminal import on_one_line
from rlhf_cli.views.chat_screen import Answer, Shown

COMMANDS = {
    "again": "other answers to the last message",
    "undo": "take the last message and its answers back",
    "new": "forget all that was said",
    "system TEXT": "the system prompt from here on; without TEXT there is none",
    "temperature T": "of sampling; 0 takes the likeliest token each time",
    "save FILE": "the dialogue, for each policy a line of messages, as stages read rows",
    "help": "these words",
    "bye": "end, as Ctrl-D does",
}
SCORED, ENDS = "reward {:.4g}", {"length": "cut at its longest", "interrupted": "interrupted"}


@dataclass
class Exchange:
    """A message, and an answer of each policy."""

    message: str
    answers: list[Answer]


class Voice(Protocol):
    """A policy, as views/speaker.py makes one."""

    name: str

    def reads(self, system: str, told: Sequence[Exchange], place: int, message: str) -> Any:
        """See Speaker.reads."""

    def answers(self, known: Any, temperature: float, heard: Callable[[str], None]) -> Answer:
        """See Speaker.answers."""


class Chat:
    """A dialogue with policies, of which each sees its own answers.

    told: what was said.
    """

    def __init__(
        self, voices: Sequence[Voice], shown: Shown, temperature: float, system: str = ""
    ) -> None:
        self._voices, self._shown = voices, shown
        self._temperature, self._prompt = temperature, system
        self._left_out = [0] * len(voices)
        self.told: list[Exchange] = []

    def take(self, line: str) -> bool:
        """Answer a message, or obey a command; False where that ends the dialogue."""
        name, _, rest = line.rstrip().partition(" ")
        if name == "/bye":
            return False
        obey = {
            "/again": self._again,
            "/undo": self._undo,
            "/new": self._new,
            "/system": self._system,
            "/temperature": self._set_temperature,
            "/save": self._save,
            "/help": self._help,
        }.get(name)
        try:
            if obey is not None:
                obey(rest.strip())
            elif line.startswith("/"):
                say(f"no command {name}; /help names them; a blank before / makes it a message")
            elif line.strip():
                self._answer(line.strip())
        except UserError as error:
            say(str(error))
        except KeyboardInterrupt:  # outside of what a policy writes, as where answers are scored
            say("interrupted: nothing is added")
        return True

    def _answer(self, message: str) -> None:
        """Let all policies answer; nothing is added where one of them cannot read it."""
        known = []
        for place, voice in enumerate(self._voices):
            read = voice.reads(self._prompt, self.told, place, message)
            if read is None:
                raise UserError(
                    f"too long: this does not fit {voice.name} beside an answer; say it shorter"
                )
            if read.left_out > self._left_out[place]:
                say(f"note: {voice.name} no longer sees the first {read.left_out} exchanges")
            self._left_out[place] = read.left_out
            known.append(read)
        answers = []
        with self._shown:
            for place, voice in enumerate(self._voices):
                self._shown.begin(message, voice.name)
                answers.append(voice.answers(known[place], self._temperature, self._shown.hear))
                self._shown.end(answers[-1], remarks(answers[-1]))
        self.told.append(Exchange(message, answers))

    # ------------------------------------------------------------------ commands

    def _again(self, _: str) -> None:
        last = self._last()
        try:
            self._answer(last.message)
        except BaseException:  # the answers that there were stay
            self.told.append(last)
            raise

    def _undo(self, _: str) -> None:
        say(f"taken back: {on_one_line(self._last().message)}")

    def _last(self) -> Exchange:
        """The last exchange, which from now on is no part of the dialogue."""
        if not self.told:
            raise UserError("nothing was said yet")
        return self.told.pop()

    def _new(self, _: str) -> None:
        self.told.clear()
        self._left_out = [0] * len(self._voices)
        say("all that was said is forgotten")

    def _system(self, text: str) -> None:
        self._prompt = text
        say("the system prompt is set" if text else "there is no system prompt")

    def _set_temperature(self, text: str) -> None:
        with suppress(ValueError):
            if 0 <= float(text) < float("inf"):
                self._temperature = float(text)
                say(f"temperature {self._temperature:g}")
                return
        raise UserError(f"/temperature takes a number from 0 up, got {text or 'nothing'}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save takes a file")
        lines = [
            json.dumps(redacted_within(self._row(place)), ensure_ascii=False)
            for place in range(len(self._voices))
        ]
        try:
            with Path(name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in lines)
        except FileExistsError:
            raise UserError(f"{name} exists; name another file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
        say(f"saved: {name}")

    def _row(self, place: int) -> dict[str, Any]:
        """The dialogue with a policy, as a row of messages."""
        turns = [{"role": "system", "content": self._prompt}] if self._prompt else []
        for each in self.told:
            turns.append({"role": "user", "content": each.message})
            turns.append({"role": "assistant", "content": each.answers[place].text})
        scores = [each.answers[place].score for each in self.told]
        return {"messages": turns, "policy": self._voices[place].name, "rewards": scores}

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            say(f"/{name:<14} {meaning}")


def remarks(answer: Answer) -> str:
    """What is worth a word beside an answer."""
    score = [] if answer.score is None else [SCORED.format(answer.score)]
    ends = [ENDS[answer.finish_reason]] if answer.finish_reason in ENDS else []
    return ", ".join(score + ends)
