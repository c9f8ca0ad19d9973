"""The shapes in which rows come: each reader turns a plain object into a row, or says its fault."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rlhf_cli.data.files import Raw, RowError
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Stepwise,
    Text,
    Turns,
)

EXPECTED = {
    Demonstration: "{prompt, completion} or {text}",
    Preference: "{prompt, chosen, rejected}",
    Ranking: "{prompt, responses, ranks}",
    Feedback: "{prompt, completion, label: true | false} or {prompt, completion, score}",
    Stepwise: "{prompt, steps, labels}",
    Prompt: "{prompt}",
    Text: "{text}",
}


def as_row(raw: Raw, source: str) -> Row:
    """A row by its columns, in the shapes of EXPECTED, as plain text or as messages."""
    if "text" in raw:
        return Text(text_of(raw, "text", source), source)
    if "chosen" in raw or "rejected" in raw:
        return preference_of(raw, source)
    if "messages" in raw:
        return response_of(raw, *split_turns(raw["messages"], "messages", source), source)
    prompt = prompt_of(raw, source)
    if "responses" in raw:
        return ranking_of(raw, prompt, source)
    if is_given(raw, "steps") and is_given(raw, "labels"):
        return steps_of(raw, prompt, source)
    if "completion" in raw:
        return response_of(raw, prompt, text_of(raw, "completion", source), source)
    return Prompt(prompt, other_columns(raw), source)


def other_columns(raw: Raw, *judged: str) -> Raw:
    """What a row says beside prompt, response and what is `judged`: rules read it (answer, ...)."""
    ours = ("prompt", "completion", "messages", *judged)
    return {name: value for name, value in raw.items() if name not in ours}


def is_given(raw: Raw, name: str) -> bool:
    """Whether a row fills a column; the cells of CSV that say nothing are empty."""
    return raw.get(name) not in (None, "")


def column(raw: Raw, name: str, source: str) -> Any:
    """The value of a column that must be there."""
    if raw.get(name) is None:
        raise RowError(f"{source}: no column {name!r}; found {', '.join(map(str, raw)) or 'none'}")
    return raw[name]


def text_of(raw: Raw, name: str, source: str) -> str:
    """A column that must hold text, or messages that end in it."""
    value = column(raw, name, source)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise RowError(f"{source}: column {name!r} holds {type(value).__name__}, expected text")
    if not value.strip():
        raise RowError(f"{source}: column {name!r} is empty")
    check_characters(value, name, source)
    return value


def check_characters(text: str, name: str, source: str) -> None:
    """Every character is a whole one: JSON can write halves, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowError(f"{source}: column {name!r} holds half a character: {half}") from None


def prompt_of(raw: Raw, source: str) -> str | Turns:
    """The prompt column: text or messages."""
    value = column(raw, "prompt", source)
    if isinstance(value, list):
        return turns_of(value, "prompt", source)
    return text_of(raw, "prompt", source)


def turns_of(value: Any, name: str, source: str) -> Turns:
    """A list of messages, checked."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{source}: column {name!r} must hold a list of messages")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise RowError(f"{source}: column {name!r} needs messages with role and content")
        for part in ("role", "content"):
            if not isinstance(message[part], str):
                has = type(message[part]).__name__
                raise RowError(f"{source}: column {name!r}: {part} holds {has}, expected text")
            check_characters(message[part], name, source)
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def split_turns(value: Any, name: str, source: str) -> tuple[Turns, str]:
    """A dialogue as its prompt and the last message, which must be the assistant's."""
    turns = turns_of(value, name, source)
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise RowError(f"{source}: column {name!r} must end in a reply of the assistant")
    return turns[:-1], turns[-1]["content"]


def items_of(raw: Raw, name: str, source: str) -> list[Any]:
    """A column that must hold a list; CSV has it as JSON."""
    value = column(raw, name, source)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise RowError(f"{source}: column {name!r} holds {type(value).__name__}, expected a list")
    return value


def as_number(value: Any) -> float | None:
    """A finite number, which CSV has as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_label(value: Any) -> bool | None:
    """Thumbs up or down, which CSV has as text; None for all else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def number_of(raw: Raw, name: str, source: str) -> float | None:
    """A column that holds a number or is not given."""
    if not is_given(raw, name):
        return None
    number = as_number(raw[name])
    if number is None:
        raise RowError(f"{source}: column {name!r} holds {shown(raw[name])}, expected a number")
    return number


def shown(value: Any) -> str:
    """A value as an error line has room for."""
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def group_of(raw: Raw, source: str) -> str:
    """Which part of the data a row is of, by its column `source`."""
    value = raw.get("source")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{source}: column 'source' holds {type(value).__name__}, expected text")
    return str(value)


def response_of(
    raw: Raw, prompt: str | Turns, completion: str, source: str
) -> Demonstration | Feedback:
    """A response, and its judgement by thumbs (label) or a number (score) where there is one.

    A label or score of another form is a column like any other, of a demonstration.
    """
    label, score = as_label(raw.get("label")), as_number(raw.get("score"))
    columns = other_columns(raw)
    if label is None and score is None:
        return Demonstration(prompt, completion, source, columns)
    for name in ("label", "score", "source"):
        columns.pop(name, None)
    score = number_of(raw, "score", source)
    return Feedback(prompt, completion, label, score, source, group_of(raw, source), columns)


def steps_of(raw: Raw, prompt: str | Turns, source: str) -> Stepwise:
    """A response in steps, with a label for each."""
    columns = other_columns(raw, "steps", "labels")
    steps, labels = items_of(raw, "steps", source), items_of(raw, "labels", source)
    texts = [text_of({"steps": step}, "steps", source) for step in steps]
    if not texts:
        raise RowError(f"{source}: column 'steps' is empty")
    if len(labels) != len(texts):
        raise RowError(f"{source}: column 'labels' holds {len(labels)} for {len(texts)} steps")
    for label in labels:
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise RowError(
                f"{source}: column 'labels' holds {shown(label)}, expected true, false or a "
                "number from 0 (wrong) to 1 (right)"
            )
    return Stepwise(prompt, texts, [float(label) for label in labels], source, columns)


def preference_of(raw: Raw, source: str) -> Preference:
    """A comparison, with its margin if given; full dialogues in messages share their prompt."""
    margin, group = number_of(raw, "margin", source), group_of(raw, source)
    columns = other_columns(raw, "chosen", "rejected", "margin")
    if margin is not None and margin < 0:
        raise RowError(f"{source}: column 'margin' holds {margin:g}, expected 0 or more")
    chosen, rejected = column(raw, "chosen", source), column(raw, "rejected", source)
    if "prompt" not in raw and isinstance(chosen, list):
        prompt, better = split_turns(chosen, "chosen", source)
        other, worse = split_turns(rejected, "rejected", source)
        if prompt != other:
            raise RowError(f"{source}: chosen and rejected differ before their last message")
        return Preference(prompt, better, worse, source, margin, group, columns)
    texts = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    return Preference(prompt_of(raw, source), *texts, source, margin, group, columns)


def ranking_of(raw: Raw, prompt: str | Turns, source: str) -> Ranking:
    """A ranking by ranks (1 is best) or by scores (higher is better)."""
    columns = other_columns(raw, "responses", "ranks", "scores")
    responses = items_of(raw, "responses", source)
    if len(responses) < 2:
        raise RowError(f"{source}: a ranking needs 2 or more responses, got {len(responses)}")
    texts = [text_of({"responses": text}, "responses", source) for text in responses]
    by = "ranks" if is_given(raw, "ranks") else "scores"
    places = items_of(raw, by, source)
    if len(places) != len(texts):
        raise RowError(f"{source}: column {by!r} needs one number for each of {len(texts)}")
    sign = 1 if by == "ranks" else -1
    ranks = [sign * place for place in map(as_number, places) if place is not None]
    if len(ranks) < len(texts):
        raise RowError(f"{source}: column {by!r} must hold numbers")
    return Ranking(prompt, texts, ranks, source, group_of(raw, source), columns)


def as_hh(raw: Raw, source: str) -> Preference:
    """A pair of Anthropic's HH dialogues, split before the assistant's last reply."""
    turn = "\n\nAssistant:"
    chosen, rejected = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    cut = chosen.rfind(turn) + len(turn)
    prompt = chosen[:cut]
    if turn not in chosen or not rejected.startswith(prompt):
        raise RowError(f"{source}: chosen and rejected do not share a dialogue up to {turn!r}")
    sides = {"prompt": prompt, "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return preference_of(raw | sides, source)


def as_gsm8k(raw: Raw, source: str) -> Row:
    """A GSM8K problem: its solution is the demonstration, what follows #### the answer."""
    question, solution = text_of(raw, "question", source), text_of(raw, "answer", source)
    if "####" not in solution:
        raise RowError(f"{source}: column 'answer' has no '#### N'")
    answer = solution.split("####")[-1].strip()
    return Demonstration(question, solution, source, {"answer": answer})


def solutions_in(raw: Raw) -> dict[str, Raw]:
    """The columns of a GSM8K row that hold a model's solution."""
    return {
        name: value
        for name, value in raw.items()
        if isinstance(value, dict) and {"solution", "is_correct"} <= set(value)
    }


def one_solution_each(raw: Raw) -> list[Raw]:
    """A GSM8K row once for each solution in it, so that a bad one spoils no other."""
    solutions = solutions_in(raw)
    rest = {name: value for name, value in raw.items() if name not in solutions}
    return [rest | {name: solution} for name, solution in solutions.items()] or [raw]


def as_gsm8k_solution(raw: Raw, source: str) -> Feedback:
    """A model's solution of a GSM8K problem, with whether it is right."""
    question = text_of(raw, "question", source)
    if not (solutions := solutions_in(raw)):
        columns = ", ".join(map(str, raw)) or "none"
        raise RowError(f"{source}: no column with {{solution, is_correct}}; found {columns}")
    ((model, entry),) = solutions.items()
    solution, verdict = f"{model}.solution", f"{model}.is_correct"
    label = as_label(entry["is_correct"])
    if label is None:
        value = shown(entry["is_correct"])
        raise RowError(f"{source}: column {verdict!r} holds {value}, expected true or false")
    text = text_of({solution: entry["solution"]}, solution, source)
    return Feedback(question, text, label, source=source, group=model)


FORMATS: dict[str, Callable[[Raw, str], Row]] = {
    "demo": as_row,
    "rows": as_row,
    "hh": as_hh,
    "gsm8k": as_gsm8k,
    "gsm8k_solutions": as_gsm8k_solution,
}
PARTS: dict[str, Callable[[Raw], list[Raw]]] = {"gsm8k_solutions": one_solution_each}
"""Formats of which one object in the file holds several rows."""
