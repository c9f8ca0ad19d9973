"""What of samples.jsonl goes into a page: few enough responses, side by side by their prompts.

Every text is handed on as text. What is left out, for the size of the page, is said.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlhf_cli.reporting.metrics import TOKEN_VALUES, TOKENS
from rlhf_cli.runs.comparison import names_of
from rlhf_cli.views.records import Record

SCORES = ("won", "reward", "gold", "kl")
ROOM = 6_000_000  # bytes of JSON, of all sets together
PROMPTS = 1000  # of a set, before it is fitted into its room
SAMPLES = 8  # responses of a source to a prompt
OF_A_STEP = 32  # responses of a step of training
MOST_TOKENS = 300_000  # of a run's training, the last ones: ROOM has no space for as many
CHARACTERS = 20_000  # of a text; of a longer one both ends are shown
DIGITS, TOKEN_DIGITS = 6, 3  # of scores, which are compared, and of what colours a token

Answer = dict[str, Any]


@dataclass
class Source:
    """Who answered.

    of: the folder of the policy, or what else names it.
    """

    name: str
    of: str


@dataclass
class Shelf:
    """Responses that are looked at side by side: those of one evaluation, or of training.

    reference: the source that others are compared with first.
    beside: whether all responses to a prompt are seen at once, not one of each source.
    prompts: by its JSON, or another key, the prompt, and under the number of each source what it
        responded.
    about: by the same key what else is said of it: `marks`, by which it is found, and `said`.
    """

    title: str
    reference: str | None = None
    beside: bool = False
    sources: list[Source] = field(default_factory=list)
    prompts: dict[str, tuple[Any, dict[int, list[Answer]]]] = field(default_factory=dict)
    about: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    left_out: int = 0  # responses

    def source(self, of: str) -> int:
        """The number of a source; a new one if it is not known yet."""
        for number, source in enumerate(self.sources):
            if source.of == of:
                return number
        self.sources.append(Source(of, of))
        return len(self.sources) - 1

    def add(
        self, source: int, line: Mapping[str, Any], at_most: int, key: str | None = None
    ) -> None:
        """A response of a source, unless it has `at_most` to this prompt, or under this key."""
        prompt = line["prompt"]
        key = key or json.dumps(prompt, sort_keys=True)
        if key not in self.prompts and len(self.prompts) >= PROMPTS:
            self.left_out += 1
            return
        own = self.prompts.setdefault(key, (prompt, {}))[1].setdefault(source, [])
        if len(own) < at_most:
            own.append(answer_of(line))
        else:
            self.left_out += 1

    def fitted(self, room: int) -> dict[str, Any]:
        """As the page reads it: its first prompts, as many as fit into so many bytes."""
        shown: list[dict[str, Any]] = []
        left_out = self.left_out
        for key, (prompt, answers) in self.prompts.items():
            about = {name: each for name, each in self.about.get(key, {}).items() if each}
            entry = {"prompt": prompt_of(prompt), "answers": answers, **about}
            room -= len(json.dumps(entry))
            if room < 0 and shown:
                left_out += sum(map(len, answers.values()))
            else:
                shown.append(entry)
        for source, name in zip(
            self.sources, brief([each.of for each in self.sources]), strict=True
        ):
            source.name = name
        known = [each.of for each in self.sources]
        return {
            "title": self.title,
            "sources": [vars(each) for each in self.sources],
            **({"reference": known.index(self.reference)} if self.reference in known else {}),
            **({"beside": True} if self.beside else {}),
            "prompts": shown,
            "left_out": left_out,
        }


def samples_of(
    records: Sequence[Record], more: Sequence[Shelf] = (), room: int = ROOM
) -> list[dict[str, Any]]:
    """What runs have sampled, as the page reads it.

    Each evaluation is one set, at each of its temperatures; what policies said in training is
    another, and what `generate` wrote a third.

    Args:
        more: what is shown beside it.
        room: how many bytes of JSON they may be together.
    """
    shelves = [*evaluated(records), in_training(records), generated(records), *more]
    full = [shelf for shelf in shelves if shelf.prompts]
    return [shelf.fitted(room // len(full)) for shelf in full]


def evaluated(records: Sequence[Record]) -> list[Shelf]:
    """What policies said to those that judged them, a set for each temperature."""
    found: list[Shelf] = []
    for record in records:
        if record.node.stage != "evaluate":
            continue
        reference = record.config.get("reference")
        shelves: dict[str, Shelf] = {}
        for line in lines_of(record):
            if (of := policy_of(line)) is not None:
                at = str(line.get("temperature"))
                named = str(Path(reference)) if isinstance(reference, str) else None
                shelf = shelves.setdefault(at, Shelf(str(record.folder), named))
                shelf.add(shelf.source(of), line, SAMPLES)
        for at, shelf in shelves.items():
            shelf.title += f", temperature {at}" * (len(shelves) > 1)
        found += shelves.values()
    return found


def policy_of(line: Mapping[str, Any]) -> str | None:
    """Who wrote a line of an evaluation; one that is unfinished says it among what it keeps."""
    kept = line.get("kept")
    of = line.get("policy") or (kept.get("policy") if isinstance(kept, dict) else None)
    return of if isinstance(of, str) else None


def in_training(records: Sequence[Record]) -> Shelf:
    """The first responses of each step that was shown, the last steps of all runs first."""
    shelf = Shelf("in training")
    runs = []
    for record in records:
        if record.node.stage not in ("ppo", "grpo"):
            continue
        steps: dict[Any, list[dict[str, Any]]] = {}
        for line in with_last_tokens(lines_of(record)):
            own = steps.setdefault(number(line.get("step")), [])
            if len(own) < OF_A_STEP:
                own.append(line)
            else:
                shelf.left_out += 1
        runs.append([(shelf.source(str(record.folder)), own) for own in reversed(steps.values())])
    for of_runs in zip_longest(*runs):
        for source, own in filter(None, of_runs):
            for line in own:
                shelf.add(source, line, OF_A_STEP)
    return shelf


def with_last_tokens(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same lines; what earlier ones say of tokens is taken from them, once there is too much
    of that to be held.
    """
    told: deque[dict[str, Any]] = deque()
    count = 0
    for line in lines:
        if isinstance(line.get(TOKENS), list):
            told.append(line)
            count += len(line[TOKENS])
        while count > MOST_TOKENS and len(told) > 1:
            count -= len(told[0][TOKENS])
            for name in (TOKENS, *TOKEN_VALUES):
                told[0].pop(name, None)
            told.popleft()
        yield line


def generated(records: Sequence[Record]) -> Shelf:
    """What `generate` wrote."""
    shelf = Shelf("generated")
    for record in records:
        if record.node.stage == "generate":
            for line in lines_of(record):
                shelf.add(shelf.source(str(record.folder)), line, SAMPLES)
    return shelf


def lines_of(record: Record) -> Iterator[dict[str, Any]]:
    """The lines of a run that have a prompt and a response."""
    for line in record.samples():
        if line.get("prompt") is not None and isinstance(line.get("response"), str):
            yield line


def answer_of(line: Mapping[str, Any]) -> Answer:
    """A line as the page reads it; what is not known of it is left out."""
    text, cut = clipped(line["response"])
    answer: Answer = {"text": text}
    if cut:
        answer["cut"] = cut
    for name in (*SCORES, "step", "response_tokens"):
        if (value := number(line.get(name))) is not None:
            answer[name] = value
    if line.get("finish_reason") == "length":
        answer["unended"] = True
    if line.get("said"):
        answer["said"] = line["said"]
    if isinstance(line.get("parts"), dict):
        answer["parts"] = {name: number(value) for name, value in line["parts"].items()}
    tokens = line.get(TOKENS)
    if not cut and isinstance(tokens, list) and all(isinstance(each, str) for each in tokens):
        values = dict(values_of(line, len(tokens)))
        if values:
            answer |= {"tokens": tokens, **values}
    return answer


def values_of(line: Mapping[str, Any], count: int) -> Iterator[tuple[str, list[float | None]]]:
    """The values of tokens that a line has, by name."""
    for name in TOKEN_VALUES:
        values = line.get(name)
        if isinstance(values, list) and len(values) == count:
            yield name, [number(value, TOKEN_DIGITS) for value in values]


def number(value: Any, digits: int = DIGITS) -> float | int | None:
    """A finite number in so many digits; None for all else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return None


def prompt_of(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages; of a text, one without a role."""
    messages = prompt if isinstance(prompt, list) else [{"content": prompt}]
    shown = []
    for each in messages:
        message = each if isinstance(each, dict) else {"content": each}
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        role = message.get("role")
        shown.append({"text": clipped(text)[0], **({"role": str(role)} if role else {})})
    return shown


def clipped(text: str) -> tuple[str, int]:
    """Both ends of a long text, and how many characters are left out between them."""
    cut = len(text) - CHARACTERS
    if cut <= 0:
        return text, 0
    half = CHARACTERS // 2
    return f"{text[:half]}\n[... {cut:,} characters left out ...]\n{text[-half:]}", cut


def brief(paths: Sequence[str]) -> list[str]:
    """What tells paths apart; of a single one its end."""
    return (
        names_of(list(map(Path, paths))) if len(paths) > 1 else [Path(each).name for each in paths]
    )
