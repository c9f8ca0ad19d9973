"""Rows from files: found, parsed and checked, each fault named by file, line and column."""

import csv
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import Data
from rlhf_cli.data.checks import check_pairs
from rlhf_cli.data.kinds import (
    CONVERSIONS,
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Steps,
    Text,
    Turns,
    convert,
    derivable,
    derive,
    name_of,
    route,
)

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_FILES = {
    Demonstration: "demonstrations",
    Preference: "preferences",
    Ranking: "rankings",
    Feedback: "feedback",
    Steps: "steps",
    Prompt: "prompts",
    Text: "text",
}
JUDGEMENTS = (Preference, Ranking, Feedback, Steps)
"""What data.convert is for: prompts and demonstrations are derived from the rows as they are."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that some editors put first

Raw = dict[str, Any]


@dataclass
class Split:
    """Rows to train on, rows held out, and what a reader should know of how they came about."""

    train: list[Any]
    held_out: list[Any]
    notes: list[str]


class RowError(UserError):
    """One row is empty or misshapen; data.bad_rows says what to do about it."""


def read_split(data: Data, kind: type) -> Split:
    """Training and held-out rows of `kind`; no prompt is on both sides.

    Raises:
        UserError: a file is missing or empty, or a row is malformed or of an unfit kind.
    """
    notes: list[str] = []
    path, eval_path = paths_of(data, kind)
    train = source_rows(data, path, kind, notes, data.max_rows)
    place: object = path
    if eval_path is None:
        # Split before rows become another kind: every stage then holds out the same prompts.
        train, held_out = hold_out(train, data.eval_rows, path)
        place = f"{path}, held-out rows"
    else:
        held_out = source_rows(data, eval_path, kind, notes)
        place = eval_path
    about: list[str] = []
    split = Split(
        checked(as_kind(train, kind, data, path, notes), data, path, notes),
        checked(as_kind(held_out, kind, data, place, about), data, place, about),
        notes,
    )
    notes += [f"held-out rows: {note}" for note in about]
    return split


def paths_of(data: Data, kind: type) -> tuple[str | Path, str | Path | None]:
    """Where the rows are, and the held-out rows if those are apart.

    The demo has rows of every kind: the kind that is needed, or that conversions start from.
    """
    if data.format == "demo":
        names = conversions_to(data, kind)
        name = DEMO_FILES[CONVERSIONS[names[0]].start if names else kind]
        return DEMO_FOLDER / f"{name}.train.jsonl", DEMO_FOLDER / f"{name}.eval.jsonl"
    assert data.path is not None  # validate() refuses a missing path
    return data.path, data.eval_path


def first_rows(data: Data, path: str | Path, kind: type, notes: list[str]) -> list[Any]:
    """`kind` rows of the first `data.max_rows` rows."""
    rows = source_rows(data, path, kind, notes, data.max_rows)
    return as_kind(rows, kind, data, path, notes)


def read_texts(data: Data) -> Split:
    """Plain text for the pretraining mix; empty where none is named."""
    if data.text_path is None:
        return read_split(data, Text) if data.format == "demo" else Split([], [], [])
    notes: list[str] = []
    rows = read_rows(replace(data, format="rows", columns={}), data.text_path, Text, notes)
    return Split(*hold_out(rows, data.eval_rows, data.text_path), notes)


def hold_out(rows: list[Any], count: int, path: object) -> tuple[list[Any], list[Any]]:
    """Split off the rows of `count` prompts: those whose hash is lowest.

    A prompt is on one side, and on the same side at every seed, in every stage and in every file.
    """
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(identity(row), []).append(row)
    order = sorted(groups, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held = set(order[:count])
    if len(held) == len(groups):
        raise UserError(
            f"{path}: holding out {count} of {len(groups)} prompts leaves none to train on; "
            "set data.eval_rows lower or give data.eval_path"
        )
    train = [row for row in rows if identity(row) not in held]
    return train, [row for row in rows if identity(row) in held]


def identity(row: Row) -> str:
    """What makes two rows share a side of the split: their prompt, or the text itself."""
    return row.text if isinstance(row, Text) else str(row.prompt)


def read_rows(data: Data, path: str | Path, kind: type, notes: list[str]) -> list[Any]:
    """All rows of one source as `kind`; `notes` gets the counts."""
    return as_kind(source_rows(data, path, kind, notes), kind, data, path, notes)


def source_rows(
    data: Data, path: str | Path, kind: type, notes: list[str], limit: int | None = None
) -> list[Row]:
    """The first rows of one source, of the kinds that they are; all can become `kind`."""
    rows = parse_rows(data, path, notes)
    if limit is not None and limit < len(rows):
        notes.append(f"the first {limit} are used")
        rows = rows[:limit]
    if not rows:
        raise nothing_left(path, kind, notes[-1:])
    check_kinds(rows, kind, data, path)
    return rows


def parse_rows(data: Data, path: str | Path, notes: list[str]) -> list[Row]:
    """All rows of one source, of the kinds that they are."""
    reader = FORMATS[data.format]
    parts = PARTS.get(data.format, lambda raw: [raw])
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for raw, source in read_raw(path):
        for part in parts(raw):
            try:
                rows.append(reader(renamed(part, data.columns, source), source))
            except RowError as error:
                if data.bad_rows == "error":
                    raise
                dropped[str(error).removeprefix(f"{source}: ")] += 1
    kinds = Counter(name_of(type(row)) for row in rows)
    counts = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items()) or "no rows"
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
    notes.append(f"{path.name if isinstance(path, Path) else path}: {counts}{reasons}")
    return rows


def conversions_to(data: Data, kind: type) -> list[str]:
    """The conversions that apply where rows of `kind` are needed."""
    return data.convert if kind in JUDGEMENTS else []


def check_kinds(rows: list[Row], kind: type, data: Data, path: object) -> None:
    """Every conversion finds rows, and every row becomes one of `kind`.

    Raises:
        UserError: with the first row of an unfit kind, and the conversions that would help it.
    """
    names = conversions_to(data, kind)
    becomes: dict[type, type] = {type(row): type(row) for row in rows}
    for name in names:
        way = CONVERSIONS[name]
        if way.start not in becomes.values():
            raise UserError(f"data.convert: {name} found no {name_of(way.start)} rows in {path}")
        becomes = {have: way.end if now is way.start else now for have, now in becomes.items()}
    for row in rows:
        have, now = type(row), becomes[type(row)]
        if derivable(now, kind):
            continue
        what = f"this is a {name_of(have)} row"
        if now is not have:
            what += f", and a {name_of(now)} row after data.convert=[{','.join(names)}]"
        line = f"{row.source}: {what}; needed: {name_of(kind)} rows ({EXPECTED[kind]})"
        if (way_there := route(have, kind)) is not None:
            verb = "makes" if way_there else "keeps"
            line += f"; data.convert=[{','.join(way_there)}] {verb} them"
        raise UserError(line)


def as_kind(rows: list[Row], kind: type, data: Data, place: object, notes: list[str]) -> list[Any]:
    """Rows as `kind`, converted as data says and then derived; at least one.

    Raises:
        UserError: nothing is left; the line says where it went.
    """
    told: list[str] = []
    for name in conversions_to(data, kind):
        rows = convert(rows, name, data, told)
    made = derive(rows, kind, data.step_join)
    if len(made) < len(rows):
        told.append(
            f"{len(made)} {name_of(kind)} rows from {len(rows)} rows: of feedback those with "
            "label true, of steps those without a label below 0.5"
        )
    if not made:
        raise nothing_left(place, kind, told)
    notes += told
    return made


def nothing_left(place: object, kind: type, notes: list[str]) -> UserError:
    """The error that says where all rows went."""
    why = "".join(f"; {note}" for note in notes)
    return UserError(f"{place}: no usable {name_of(kind)} row ({EXPECTED[kind]}){why}")


def checked(rows: list[Any], data: Data, place: object, notes: list[str]) -> list[Any]:
    """Pairs and rankings without what data.doubtful_pairs drops; rows of other kinds as they are.

    Held-out rows are checked as training rows are: a pair that teaches nothing judges nothing.
    """
    if not isinstance(rows[0], Preference | Ranking):
        return rows
    kept = check_pairs(rows, data.doubtful_pairs, notes)
    if not kept:
        raise UserError(f"{place}: data.doubtful_pairs=drop leaves none of {len(rows)} rows")
    return kept


def renamed(raw: Raw, columns: dict[str, str], source: str) -> Raw:
    """The row under our column names, by data.columns = {ours: yours}."""
    return {**raw, **{ours: column(raw, yours, source) for ours, yours in columns.items()}}


def read_raw(path: str | Path) -> Iterator[tuple[Raw, str]]:
    """Each row as a dict, with `file:line`, from a file, a folder of files, or a hub dataset."""
    if str(path) == "-":
        for number, line in enumerate(sys.stdin, 1):
            yield {"prompt": line.rstrip("\n")}, f"stdin:{number}"
        return
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from read_raw(file)
        return
    if not place.exists():
        yield from read_hub(str(path))
        return
    count = 0
    for raw, number in PARSERS.get(place.suffix, parse_jsonl)(place):
        if not isinstance(raw, dict):
            raise UserError(f"{place}:{number}: expected an object, got {type(raw).__name__}")
        count += 1
        yield raw, f"{place}:{number}"
    if not count:
        raise UserError(f"{place}: the file has no rows")


def parse_jsonl(file: Path) -> Iterator[tuple[Any, int]]:
    """Objects, one a line; blank lines are passed over."""
    with file.open(encoding=ENCODING) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield json.loads(line), number
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise UserError(f"{file}:{number}: not JSON: {error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: not a text file in UTF-8") from None


def parse_json(file: Path) -> Iterator[tuple[Any, int]]:
    """A list of objects; the number is the place in the list."""
    try:
        rows = json.loads(file.read_text(encoding=ENCODING))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of objects")
    yield from ((row, number) for number, row in enumerate(rows, 1))


def parse_csv(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows under a header line."""
    with file.open(encoding=ENCODING, newline="") as lines:
        try:
            for number, row in enumerate(csv.DictReader(lines), 2):
                yield row, number
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not CSV in UTF-8: {error}") from None


def parse_parquet(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not Parquet: {error}") from None
    yield from ((row, number) for number, row in enumerate(table.to_pylist(), 1))


PARSERS: dict[str, Callable[[Path], Iterator[tuple[Any, int]]]] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".parquet": parse_parquet,
}


def read_hub(name: str) -> Iterator[tuple[Raw, str]]:
    """Rows of a hub dataset's train split; `owner/name:config:split` says more."""
    repo, _, rest = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(repo).suffix in SUFFIXES:
        raise UserError(f"no such file: {name}")
    from datasets import load_dataset

    config, _, split = rest.partition(":")
    try:
        dataset = load_dataset(repo, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds; each means that we have no rows
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no file {name}, and no hub dataset of that name: {first}") from None
    for number, row in enumerate(dataset, 1):
        yield dict(row), f"{name}:{number}"


# --------------------------------------------------------------------------- shapes of rows

EXPECTED = {
    Demonstration: "{prompt, completion} or {text}",
    Preference: "{prompt, chosen, rejected}",
    Ranking: "{prompt, responses, ranks}",
    Feedback: "{prompt, completion, label: true | false} or {prompt, completion, score}",
    Steps: "{prompt, steps, labels}",
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


def other_columns(raw: Raw) -> Raw:
    """What a row says beside prompt and response: rules read it (answer, ...)."""
    ours = ("prompt", "completion", "messages")
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
    return value


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
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in value]


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
        with suppress(json.JSONDecodeError, RecursionError):
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


def steps_of(raw: Raw, prompt: str | Turns, source: str) -> Steps:
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
    return Steps(prompt, texts, [float(label) for label in labels], source)


def preference_of(raw: Raw, source: str) -> Preference:
    """A comparison, with its margin if given; full dialogues in messages share their prompt."""
    margin, group = number_of(raw, "margin", source), group_of(raw, source)
    if margin is not None and margin < 0:
        raise RowError(f"{source}: column 'margin' holds {margin:g}, expected 0 or more")
    chosen, rejected = column(raw, "chosen", source), column(raw, "rejected", source)
    if "prompt" not in raw and isinstance(chosen, list):
        prompt, better = split_turns(chosen, "chosen", source)
        other, worse = split_turns(rejected, "rejected", source)
        if prompt != other:
            raise RowError(f"{source}: chosen and rejected differ before their last message")
        return Preference(prompt, better, worse, source, margin, group)
    texts = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    return Preference(prompt_of(raw, source), *texts, source, margin, group)


def ranking_of(raw: Raw, prompt: str | Turns, source: str) -> Ranking:
    """A ranking by ranks (1 is best) or by scores (higher is better)."""
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
    return Ranking(prompt, texts, ranks, source, group_of(raw, source))


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
    if not (found := solutions_in(raw)):
        columns = ", ".join(map(str, raw)) or "none"
        raise RowError(f"{source}: no column with {{solution, is_correct}}; found {columns}")
    ((model, entry),) = found.items()
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
