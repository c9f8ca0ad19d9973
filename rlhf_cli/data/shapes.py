"""The shapes in which rows are published: each is turned into our columns, which one reader reads.

What a shape does not read stays with the row, for rules and templates.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.schema.data import Data
from rlhf_cli.data.columns import (
    COMMON,
    OURS,
    PAIR,
    MissingColumn,
    check_names,
    column,
    is_given,
    renamed,
    shown,
)
from rlhf_cli.data.files import Raw, RowError
from rlhf_cli.data.kinds import Prompt, Row
from rlhf_cli.data.labels import THUMBS, as_label, as_number
from rlhf_cli.data.messages import text_of, turns_of
from rlhf_cli.data.readers import as_row, items_of

Reader = Callable[[Raw, str], Row]


@dataclass(frozen=True)
class Shape:
    """A published shape: the columns it reads, and how they become ours."""

    reads: tuple[str, ...]
    as_ours: Callable[[Raw, str], Raw]

    def __call__(self, raw: Raw, source: str) -> Row:
        """The row, with the columns that the shape does not read."""
        common = {name: raw[name] for name in COMMON if name in raw}
        row = as_row(common | self.as_ours(raw, source), source)
        for name, value in raw.items():
            if name not in self.reads and name not in COMMON and value is not None:
                row.columns.setdefault(name, value)
        return row


def given(raw: Raw, *names: str) -> Raw:
    """Those of some columns that a row fills."""
    return {name: raw[name] for name in names if is_given(raw, name)}


def needing(*names: str, also: tuple[str, ...] = ()) -> Shape:
    """A shape in our own columns, of which some must be there."""

    def as_ours(raw: Raw, source: str) -> Raw:
        return {name: column(raw, name, source) for name in names} | given(raw, *also)

    return Shape((*names, *also), as_ours)


# --------------------------------------------------------------------------- shapes


def alpaca(raw: Raw, source: str) -> Raw:
    """Stanford's instructions; `history` and pairs as LLaMA-Factory has them.

    The input follows its instruction after a blank line.
    """
    asked = text_of(raw, "instruction", source)
    if is_given(raw, "input") and str(raw["input"]).strip():
        asked += "\n\n" + text_of(raw, "input", source)
    history = items_of(raw, "history", source) if is_given(raw, "history") else []
    turns = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"{source}: column 'history' must hold pairs of question and reply")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if is_given(raw, "chosen") or is_given(raw, "rejected"):
        prompt = [*turns, {"role": "user", "content": asked}] if turns else asked
        return {"prompt": prompt, **given(raw, "chosen", "rejected")}
    reply = text_of(raw, "output", source)
    if turns:
        last = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        return {"messages": [*turns, *last], **thumb(raw)}
    return {"prompt": asked, "completion": reply, **thumb(raw)}


def thumb(raw: Raw) -> Raw:
    """A judgement as LLaMA-Factory's rows have it."""
    return {"label": raw["kto_tag"]} if is_given(raw, "kto_tag") else given(raw, "label")


def sharegpt(raw: Raw, source: str) -> Raw:
    """Conversations; with `chosen` and `rejected` they end in the question, as in LLaMA-Factory."""
    name = "conversation" if is_given(raw, "conversation") else "conversations"
    turns = turns_of(column(raw, name, source), name, source)
    if is_given(raw, "chosen") or is_given(raw, "rejected"):
        if turns[-1]["role"] == "assistant":
            raise RowError(
                f"{source}: column {name!r} ends in a reply; beside chosen and rejected it must "
                "end in what they answer"
            )
        return {"prompt": turns, **given(raw, "chosen", "rejected")}
    if turns[-1]["role"] != "assistant":
        raise RowError(f"{source}: column {name!r} must end in a reply of the assistant")
    return {"messages": turns, **thumb(raw)}


def ultrafeedback(raw: Raw, source: str) -> Raw:
    """OpenBMB's four answers to an instruction, or the pairs that others made of them.

    Answers go by fine-grained_score, their mean over aspects: overall_score is 10 where 1 was meant
    in some published rows.
    """
    if not is_given(raw, "completions"):
        ours = {name: column(raw, name, source) for name in ("chosen", "rejected")}
        scores = [as_number(raw.get(f"score_{side}")) for side in ours]
        if None not in scores and is_given(raw, "score_chosen"):
            better, worse = scores
            if better < worse:  # type: ignore[operator]
                raise RowError(
                    f"{source}: column 'score_chosen' holds {better:g}, less than 'score_rejected' "
                    f"with {worse:g}"
                )
            ours["margin"] = better - worse  # type: ignore[operator]
        return ours | given(raw, "prompt")
    answers = objects_of(raw, "completions", source)
    by = "fine-grained_score"
    if not all(is_given(answer, by) for answer in answers):
        by = "overall_score"
    return {
        "prompt": column(raw, "instruction", source),
        "responses": [inner(answer, "response", "completions", source) for answer in answers],
        "scores": [inner(answer, by, "completions", source) for answer in answers],
    }


HELPSTEER_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def helpsteer(raw: Raw, source: str) -> Raw:
    """NVIDIA's answers with marks for helpfulness, or preferences from -3 to 3 (HelpSteer2 and 3).

    Above 0 the second response is the better one.
    """
    by = next((name for name in HELPSTEER_PAIRS if is_given(raw, name)), None)
    if by is None:
        return {
            "prompt": helpsteer_prompt(raw, source),
            "completion": column(raw, "response", source),
            "score": column(raw, "helpfulness", source),
        }
    better = as_number(raw[by])
    if better is None or not -3 <= better <= 3:
        raise RowError(f"{source}: column {by!r} holds {shown(raw[by])}, expected -3 to 3")
    if better == 0:
        raise RowError(f"{source}: column {by!r} is 0: neither response is better")
    sides = [column(raw, name, source) for name in HELPSTEER_PAIRS[by]]
    rejected, chosen = sides if better > 0 else sides[::-1]
    third = by == "overall_preference"
    return {
        "prompt": column(raw, "context", source) if third else helpsteer_prompt(raw, source),
        "chosen": chosen,
        "rejected": rejected,
        "margin": abs(better),
    }


HELPSTEER_PAIRS = {
    "overall_preference": ("response1", "response2"),
    "preference_strength": ("response_1", "response_2"),
}


def helpsteer_prompt(raw: Raw, source: str) -> str | list[Raw]:
    """A prompt as text, or as a dialogue where marks in it say who speaks."""
    asked = text_of(raw, "prompt", source)
    first, *rest = HELPSTEER_TURN.split(asked)
    turns = [{"role": "user", "content": first}]
    turns += [
        {"role": role.lower(), "content": text}
        for role, text in zip(rest[::2], rest[1::2], strict=True)
    ]
    return turns if rest else asked


def prm800k(raw: Raw, source: str) -> Raw:
    """OpenAI's labelled steps, Math-Shepherd's, or TRL's {prompt, completions, labels}."""
    if is_given(raw, "completions"):
        labels = [as_label(label) for label in items_of(raw, "labels", source)]
        if None in labels:
            has = shown(items_of(raw, "labels", source)[labels.index(None)])
            raise RowError(f"{source}: column 'labels' holds {has}, expected {THUMBS}")
        asked, steps = column(raw, "prompt", source), raw["completions"]
        return {"prompt": asked, "steps": steps, "labels": labels}
    if isinstance(raw.get("label"), str) and is_given(raw, "input"):
        return math_shepherd(raw, source)
    question = object_of(raw, "question", source)
    asked = inner(question, "problem", "question", source)
    answer = (
        {"answer": question["ground_truth_answer"]} if "ground_truth_answer" in question else {}
    )
    label = object_of(raw, "label", source)
    if label.get("finish_reason") == "bad_problem":
        raise RowError(f"{source}: the labeller called this a bad problem")
    steps, ratings = [], []
    for step in objects_of(label, "steps", source):
        text, rating = step_taken(step, source)
        if rating is None:
            break  # what comes after a step that nobody judged is judged on other grounds
        steps.append(text)
        ratings.append(RATINGS[rating])
    return {"prompt": asked, "steps": steps, "labels": ratings, **answer}


RATINGS = {1: 1.0, 0: 1.0, -1: 0.0}
"""A step that is neither right nor wrong counts as right (Lightman 2305.20050, appendix F.2)."""


def step_taken(step: Raw, source: str) -> tuple[str, int | None]:
    """The step that the solution went on with, and its rating: a person's own is right.

    Where it went on with none, its first one.
    """
    human = step.get("human_completion")
    if isinstance(human, dict):
        return inner(human, "text", "human_completion", source), 1
    steps = objects_of(step, "completions", source)
    place = step.get("chosen_completion") or 0
    if not isinstance(place, int) or not 0 <= place < len(steps):
        raise RowError(f"{source}: chosen_completion {shown(place)} is none of {len(steps)} steps")
    rating = steps[place].get("rating")
    if rating not in (None, *RATINGS):
        raise RowError(f"{source}: a rating is -1, 0 or 1, this one holds {shown(rating)}")
    return inner(steps[place], "text", "completions", source), rating


SHEPHERD_TAG = "\u043a\u0438"  # stands where the label has + or -


def math_shepherd(raw: Raw, source: str) -> Raw:
    """Steps that end in a tag in `input`, and in + or - in `label`."""
    text, label = text_of(raw, "input", source), text_of(raw, "label", source)
    pieces = text.split(SHEPHERD_TAG)
    asked, step, first = pieces[0].partition("Step 1:")
    signs, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        signs.append(label[at : at + 1])
        at += 1
    if not step or not set(signs) <= {"+", "-"}:
        raise RowError(f"{source}: columns 'input' and 'label' are no steps with + and -")
    steps = [(step + first).strip(), *(piece.strip() for piece in pieces[1:-1])]
    return {"prompt": asked.strip(), "steps": steps, "labels": [sign == "+" for sign in signs]}


def tldr(raw: Raw, source: str) -> Raw:
    """OpenAI's comparisons of summaries, under the prompt of TRL's pairs; or those rows."""
    if not is_given(raw, "summaries"):
        return given(raw, "prompt", "completion", "chosen", "rejected")
    info, summaries = object_of(raw, "info", source), objects_of(raw, "summaries", source)
    choice = column(raw, "choice", source)
    if len(summaries) != 2 or isinstance(choice, bool) or choice not in (0, 1):
        raise RowError(f"{source}: expected two summaries and a choice of 0 or 1")
    texts = [inner(summary, "text", "summaries", source) for summary in summaries]
    if is_given(info, "article"):
        parts = [f"ARTICLE: {info['article']}"]
    else:
        post = inner(info, "post", "info", source)
        parts = [f"SUBREDDIT: r/{info['subreddit']}"] if is_given(info, "subreddit") else []
        parts += [f"TITLE: {info['title']}"] if is_given(info, "title") else []
        parts += [f"POST: {post}"]
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}


def stack_exchange(raw: Raw, source: str) -> Raw:
    """Answers with the votes for them, or the pairs made of them."""
    asked = column(raw, "question", source)
    if is_given(raw, "response_j"):
        better, worse = (column(raw, f"response_{side}", source) for side in "jk")
        return {"prompt": asked, "chosen": better, "rejected": worse}
    answers = objects_of(raw, "answers", source)
    texts = [inner(answer, "text", "answers", source) for answer in answers]
    scores = [inner(answer, "pm_score", "answers", source) for answer in answers]
    return {"prompt": asked, "responses": texts, "scores": scores}


def verl(raw: Raw, source: str) -> Raw:
    """A prompt and the answer that a rule compares with; all columns are kept for rules."""
    truth = inner(object_of(raw, "reward_model", source), "ground_truth", "reward_model", source)
    return {"prompt": column(raw, "prompt", source), "answer": truth}


def hh(raw: Raw, source: str) -> Raw:
    """A pair of Anthropic's HH dialogues, split before the assistant's last reply."""
    turn = "\n\nAssistant:"
    chosen, rejected = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    cut = chosen.rfind(turn) + len(turn)
    prompt = chosen[:cut]
    if turn not in chosen or not rejected.startswith(prompt):
        raise RowError(f"{source}: chosen and rejected do not share a dialogue up to {turn!r}")
    sides = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    for name, side in sides.items():
        if more := next((mark for mark in ("\n\nHuman:", turn) if mark in side), None):
            raise RowError(
                f"{source}: column {name!r} goes on with {more!r} after the reply that is compared"
            )
    return {"prompt": prompt, **sides, **given(raw, "margin")}


def gsm8k(raw: Raw, source: str) -> Raw:
    """A GSM8K problem: its solution is the demonstration, what follows #### the answer."""
    question, solution = text_of(raw, "question", source), text_of(raw, "answer", source)
    if "####" not in solution:
        raise RowError(f"{source}: column 'answer' has no '#### N'")
    answer = solution.split("####")[-1].strip()
    return {"prompt": question, "completion": solution, "answer": answer}


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


def gsm8k_solution(raw: Raw, source: str) -> Row:
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
    ours = {"prompt": question, "completion": text, "label": label, "source": model}
    rest = {name: raw[name] for name in raw if name not in ("question", model, *OURS)}
    return as_row(rest | ours, source)


# --------------------------------------------------------------------------- parts of objects


def object_of(raw: Raw, name: str, source: str) -> Raw:
    """A column that must hold an object; CSV has it as JSON."""
    value = column(raw, name, source)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, dict):
        has = type(value).__name__
        raise RowError(f"{source}: column {name!r} holds {has}, expected an object")
    return value


def objects_of(raw: Raw, name: str, source: str) -> list[Raw]:
    """A column that must hold a list of objects."""
    values = items_of(raw, name, source)
    if not all(isinstance(value, dict) for value in values):
        raise RowError(f"{source}: column {name!r} must hold a list of objects")
    return values


def inner(value: Raw, key: str, name: str, source: str) -> Any:
    """What an object of column `name` has under a key."""
    if value.get(key) is None:
        found = ", ".join(map(str, value)) or "none"
        raise RowError(f"{source}: column {name!r}: no {key!r}; found {found}")
    return value[key]


# --------------------------------------------------------------------------- which shape

THUMBS_OF = ("label", "kto_tag")

SHAPES = {
    "alpaca": Shape(("instruction", "input", "output", "history", *THUMBS_OF, *PAIR), alpaca),
    "sharegpt": Shape(("conversations", "conversation", *THUMBS_OF, *PAIR), sharegpt),
    "messages": needing("messages", also=("label", "score")),
    "ultrafeedback": Shape(
        (
            *("instruction", "completions", "prompt", *PAIR),
            *("score_chosen", "score_rejected", "messages"),  # these are the chosen side again
        ),
        ultrafeedback,
    ),
    "helpsteer": Shape(
        (
            *("prompt", "response", "helpfulness"),
            *("context", "response1", "response2", "overall_preference"),
            *("response_1", "response_2", "preference_strength"),
        ),
        helpsteer,
    ),
    "kto": needing("prompt", "completion", "label", also=("score",)),
    "prm800k": Shape(("question", "label", "prompt", "completions", "labels", "input"), prm800k),
    "tldr": Shape(("info", "summaries", "choice", "prompt", "completion", *PAIR), tldr),
    "stack_exchange": Shape(("question", "answers", "response_j", "response_k"), stack_exchange),
    "verl": Shape(("prompt",), verl),
    "text": needing("text"),
    "hh": Shape((*PAIR, "prompt", "margin"), hh),
    "gsm8k": Shape(("question", "answer"), gsm8k),
}

FORMATS: dict[str, Reader] = {
    "demo": as_row,
    "rows": as_row,
    "gsm8k_solutions": gsm8k_solution,
    **SHAPES,
}
PARTS: dict[str, Callable[[Raw], list[Raw]]] = {"gsm8k_solutions": one_solution_each}
"""Formats of which one object in the file holds several rows."""

KNOWN: list[tuple[str, str, tuple[tuple[str, ...], ...]]] = [
    ("sharegpt", "ShareGPT conversations", (("conversations",), ("conversation",))),
    ("ultrafeedback", "UltraFeedback rows", (("instruction", "completions"),)),
    (
        "helpsteer",
        "HelpSteer rows",
        (
            ("response", "helpfulness"),
            ("response1", "response2", "overall_preference"),
            ("response_1", "response_2", "preference_strength"),
        ),
    ),
    ("alpaca", "Alpaca rows", (("instruction", "output"), ("instruction", *PAIR))),
    ("tldr", "comparisons of summaries", (("info", "summaries"),)),
    ("stack_exchange", "Stack Exchange rows", (("question", "response_j"), ("qid", "answers"))),
    ("prm800k", "rows of labelled steps", (("completions", "labels"), ("input", "label", "task"))),
    ("verl", "rows for verl", (("data_source", "reward_model"),)),
    ("messages", "dialogues", (("messages",),)),
]
"""The option that reads rows with some columns, and what they are called."""


def looks_like(raw: Raw, format: str) -> str:
    """`; these look like ...: data=OPTION` for a row of a shape known by another name.

    Or, of a row in no known shape, the column that may be its prompt.
    """
    for option, what, signatures in KNOWN:
        if any(all(is_given(raw, name) for name in names) for names in signatures):
            return "" if option == format else f"; these look like {what}: data={option}"
    question, label, chosen = (raw.get(name) for name in ("question", "label", "chosen"))
    found = None
    if isinstance(question, dict) and isinstance(label, dict):
        found = "prm800k", "PRM800K solutions"
    elif isinstance(raw.get("answers"), list) and question:
        found = "stack_exchange", "Stack Exchange rows"
    elif isinstance(chosen, str) and "\n\nAssistant:" in chosen:
        found = "hh", "HH dialogues"
    elif isinstance(question, str) and "####" in str(raw.get("answer")):
        found = "gsm8k", "GSM8K problems"
    elif solutions_in(raw):
        found = "gsm8k_solutions", "model solutions of GSM8K"
    if found is None:
        asks = [name for name in ASKS if isinstance(raw.get(name), str)]
        hint = asks and format == "rows" and not is_given(raw, "prompt")
        return f"; data.columns.prompt={asks[0]} reads its column {asks[0]!r}" if hint else ""
    if found[0] == format:
        return ""
    return f"; these look like {found[1]}: data={found[0]}"


ASKS = ("question", "instruction", "query", "problem", "input")
"""Other names for a prompt."""

REPLIES = ("response", "output", "reply", "answer")
"""Other names for a completion."""


def missed(row: Row, format: str) -> str:
    """What a row of `format` that gives a prompt alone may have meant, for an error line."""
    if not isinstance(row, Prompt):
        return ""
    if like := looks_like({"prompt": row.prompt, **row.columns}, format):
        return like
    named = next((name for name in REPLIES if isinstance(row.columns.get(name), str)), None)
    return f"; data.columns.completion={named} reads its column {named!r}" if named else ""


def reader_of(data: Data) -> Reader:
    """The reader of one data config: columns renamed, then read in the shape of data.format.

    Raises:
        UserError: data.columns has a name that is nearly one of the shape's columns.
    """
    read, columns = FORMATS[data.format], data.columns
    reads = (*SHAPES[data.format].reads, *COMMON) if data.format in SHAPES else OURS
    if data.format != "gsm8k_solutions":
        check_names(columns, reads, data.format)

    def row_of(raw: Raw, source: str) -> Row:
        try:
            if not columns:
                return read(raw, source)
            ours, beside = renamed(raw, columns, source)
            row = read(ours, source)
            for name, value in beside.items():
                row.columns.setdefault(name, value)
            return row
        except MissingColumn as error:
            if like := looks_like(raw, data.format):
                raise MissingColumn(f"{error}{like}") from None
            raise

    return row_of
