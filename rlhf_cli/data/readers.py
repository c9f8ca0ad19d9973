"""A plain object under our column names becomes a row, or says its fault."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

from rlhf_cli.data.columns import column, filled, is_given, shown
from rlhf_cli.data.kinds import (
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Reply,
    Row,
    Stepwise,
    Text,
    reply_text,
)
from rlhf_cli.data.labels import as_number, check_weight, label_of, number_of
from rlhf_cli.data.messages import (
    Cell,
    answered,
    as_turns,
    cell_of,
    system_of,
    text_of,
    turns_of,
    with_system,
)
from rlhf_cli.data.raw import Raw, RowError

LONG = 24  # characters of a prompt that is no greeting, in writing without blanks
HH_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)

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
    """A row by its columns, in the shapes of EXPECTED, as plain text or as messages.

    The judgements come before what they judge, and a prompt before text beside it.
    """
    raw = filled(raw)
    if "weight" in raw:
        check_weight(raw, source)
    if "chosen" in raw or "rejected" in raw:
        return preference_of(raw, source)
    if "messages" in raw:
        return dialogue_of(raw, source)
    if "text" in raw and "prompt" not in raw:
        text = text_of(raw, "text", source)
        return Text(text, source, {name: raw[name] for name in raw if name != "text"})
    prompt = cell_of(raw, "prompt", source)
    if "responses" in raw:
        return ranking_of(raw, prompt, source)
    if is_given(raw, "steps") and is_given(raw, "labels"):
        return steps_of(raw, prompt, source)
    if "completion" in raw:
        return response_of(raw, prompt, source)
    asked = under_system(prompt, raw, source)
    return Prompt(asked, columns_of(raw, asked, source, ("prompt",)), source)


def columns_of(raw: Raw, prompt: Cell, source: str, read: tuple[str, ...]) -> Raw:
    """What a row says beside what is `read`: rules and templates read it (answer, ...).

    Raises:
        RowError: its system message is no text, or its tools are no list.
    """
    columns = {name: value for name, value in raw.items() if name not in read}
    if "system" in columns:
        system = system_of(raw, source)
        del columns["system"]
        if system is not None and isinstance(prompt, str):
            columns["system"] = system
    if "tools" in columns and not (tools := items_of(raw, "tools", source)):
        del columns["tools"]
    elif "tools" in columns:
        columns["tools"] = tools
    return columns


def under_system(prompt: Cell, raw: Raw, source: str) -> Cell:
    """A prompt; a dialogue is put under the row's system message."""
    return prompt if isinstance(prompt, str) else with_system(prompt, raw, source)


def shared(prompts: Sequence[Cell], differ: str, raw: Raw, source: str) -> Cell:
    """The one prompt of responses; as a dialogue if one of them comes as a dialogue."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        prompts = [as_turns(prompt, raw, source) for prompt in prompts]
    if any(prompt != prompts[0] for prompt in prompts):
        raise RowError(f"{source}: {differ} before their last message")
    return prompts[0]


def items_of(raw: Raw, name: str, source: str) -> list[Any]:
    """A column that must hold a list; CSV has it as JSON."""
    value = column(raw, name, source)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value == "" and name == "tools":
        return []
    if not isinstance(value, list):
        raise RowError(f"{source}: column {name!r} holds {type(value).__name__}, expected a list")
    return value


def group_of(raw: Raw, source: str) -> str:
    """Which part of the data a row is of, by its column `source`."""
    value = raw.get("source")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{source}: column 'source' holds {type(value).__name__}, expected text")
    return str(value)


# --------------------------------------------------------------------------- kinds


def dialogue_of(raw: Raw, source: str) -> Demonstration | Feedback:
    """A dialogue in `messages`, of which every reply may be learnt.

    A column `prompt` beside it must be part of it; a column `completion` is the reply to it, where
    it ends in the user's words.
    """
    turns = turns_of(raw["messages"], "messages", source)
    prompt = cell_of(raw, "prompt", source) if "prompt" in raw else None
    if turns[-1]["role"] == "user":
        if "completion" not in raw:
            raise RowError(
                f"{source}: column 'messages' must end in a reply of the assistant; "
                "data=rows data.columns.prompt=messages reads dialogues to respond to"
            )
        return response_of(raw, turns, source)
    if len(turns) == 1:
        raise RowError(
            f"{source}: column 'messages' must end in a reply of the assistant to another message"
        )
    asked, reply, _ = answered(raw, prompt, "messages", turns, source, judged=False)
    return judged_or_shown(raw, asked, reply, 0, source, ("prompt", "messages"))


def response_of(raw: Raw, prompt: Cell, source: str) -> Demonstration | Feedback:
    """A response in `completion`: it alone is learnt, with what it says before its last message."""
    cell = cell_of(raw, "completion", source)
    asked, reply, given = answered(raw, prompt, "completion", cell, source, judged=False)
    check_no_echo(prompt, [cell], "the completion begins", source)
    read = ("prompt", "completion", "messages")
    return judged_or_shown(raw, asked, reply, given, source, read)


def judged_or_shown(
    raw: Raw, prompt: Cell, reply: Reply, learn_from: int, source: str, read: tuple[str, ...]
) -> Demonstration | Feedback:
    """A response, and its judgement by thumbs (label) or a number (score) where there is one."""
    label, spelling = label_of(raw, source)
    score = number_of(raw, "score", source)
    if label is None and score is None:
        columns = columns_of(raw, prompt, source, (*read, "label", "score"))
        return Demonstration(prompt, reply, source, columns, learn_from)
    columns = columns_of(raw, prompt, source, (*read, "label", "score", "source"))
    group = group_of(raw, source)
    return Feedback(prompt, reply, label, score, source, group, columns, spelling)


def preference_of(raw: Raw, source: str) -> Preference:
    """A comparison, with its margin and soft label if given; full dialogues in messages share their
    prompt.
    """
    margin, group = number_of(raw, "margin", source), group_of(raw, source)
    p = number_of(raw, "p", source)
    if margin is not None and margin < 0:
        raise RowError(f"{source}: column 'margin' holds {margin:g}, expected 0 or more")
    if p is not None and not 0 <= p <= 1:
        raise RowError(f"{source}: column 'p' holds {p:g}, expected a chance from 0 to 1")
    chosen, rejected = cell_of(raw, "chosen", source), cell_of(raw, "rejected", source)
    prompt = cell_of(raw, "prompt", source) if "prompt" in raw else None
    asked, better, _ = answered(raw, prompt, "chosen", chosen, source)
    other, worse, _ = answered(raw, prompt, "rejected", rejected, source)
    asked = shared((asked, other), "chosen and rejected differ", raw, source)
    if all(isinstance(cell, str) and HH_DIALOGUE.match(cell) for cell in (chosen, rejected)):
        raise RowError(
            f"{source}: chosen and rejected are whole dialogues; these look like HH dialogues: "
            "data=hh"
        )
    check_no_echo(prompt, [chosen, rejected], "chosen and rejected begin", source)
    read = ("prompt", "chosen", "rejected", "margin", "p", "source")
    columns = columns_of(raw, asked, source, read)
    return Preference(asked, better, worse, source, margin, group, columns, p)


def ranking_of(raw: Raw, prompt: Cell, source: str) -> Ranking:
    """A ranking by ranks (1 is best) or by scores (higher is better)."""
    cells = items_of(raw, "responses", source)
    if len(cells) < 2:
        raise RowError(f"{source}: a ranking needs 2 or more responses, got {len(cells)}")
    asked: list[Cell] = []
    replies: list[Reply] = []
    cells = [cell_of({"responses": each}, "responses", source) for each in cells]
    for cell in cells:
        before, reply, _ = answered(raw, prompt, "responses", cell, source)
        asked.append(before)
        replies.append(reply)
    check_no_echo(prompt, cells, "the responses begin", source)
    ranks = ranks_of(raw, len(replies), source)
    before = shared(asked, "the responses differ", raw, source)
    columns = columns_of(raw, before, source, ("prompt", "responses", "ranks", "scores", "source"))
    return Ranking(before, replies, ranks, source, group_of(raw, source), columns)


def ranks_of(raw: Raw, count: int, source: str) -> list[float]:
    """The ranks of so many responses, or their scores with the sign turned.

    Raises:
        RowError: they are no numbers, or both are there and put two responses the other way round.
    """
    given = [by for by in ("ranks", "scores") if is_given(raw, by)] or ["scores"]
    found = [numbers_of(raw, by, count, source) for by in given]
    places = [
        [-number for number in numbers] if by == "scores" else numbers
        for by, numbers in zip(given, found, strict=True)
    ]
    if len(places) == 2:
        for (one, first), (two, second) in combinations(zip(*places, strict=True), 2):
            if (one - two) * (first - second) < 0:
                raise RowError(
                    f"{source}: columns 'ranks' (1 is best) and 'scores' (higher is better) order "
                    "the responses differently; leave out one of them"
                )
    return places[0]


def numbers_of(raw: Raw, name: str, count: int, source: str) -> list[float]:
    """A column that must hold a list of so many numbers."""
    values = items_of(raw, name, source)
    if len(values) != count:
        raise RowError(f"{source}: column {name!r} needs one number for each of {count}")
    numbers = [number for number in map(as_number, values) if number is not None]
    if len(numbers) < count:
        raise RowError(f"{source}: column {name!r} must hold numbers")
    return numbers


def check_no_echo(prompt: Cell | None, replies: Sequence[Cell], begin: str, source: str) -> None:
    """Replies are not the whole text, prompt included: it would be learnt twice.

    A short prompt may be said again in earnest (a greeting), so that one reply alone must repeat
    several words, or a question.

    Args:
        replies: what the columns hold; those that are messages are apart from their prompt.
        begin: names the replies in the error line.

    Raises:
        RowError: all of them are text that begins with the prompt and goes on.
    """
    if isinstance(prompt, list):
        prompt = reply_text(prompt[-1]) if len(prompt) == 1 else None
    said = (prompt or "").strip()
    least = 2 if len(replies) > 1 or said.endswith("?") else 4
    if len(said.split()) < least and len(said) < LONG:
        return
    for reply in replies:
        rest = reply.strip().partition(said) if isinstance(reply, str) else ("no text", "", "")
        if rest[0] or not rest[2] or (said[-1].isalnum() and rest[2][0].isalnum()):
            return
    raise RowError(
        f"{source}: {begin} with the whole prompt, which would be learnt twice; write the replies "
        "alone, without the prompt"
    )


def steps_of(raw: Raw, prompt: Cell, source: str) -> Stepwise:
    """A response in steps, with a label for each."""
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
    asked = under_system(prompt, raw, source)
    columns = columns_of(raw, asked, source, ("prompt", "steps", "labels"))
    return Stepwise(asked, texts, [float(label) for label in labels], source, columns)
