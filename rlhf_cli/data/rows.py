"""Rows from files: found, parsed and checked, each fault named by file, line and column."""

import csv
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import Data
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Ranking, Row, Text, Turns, derive

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_FILES = {
    Demonstration: "demonstrations",
    Preference: "preferences",
    Ranking: "rankings",
    Prompt: "prompts",
    Text: "text",
}
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
    if data.format == "demo":
        file = f"{DEMO_FILES[kind]}.{{}}.jsonl"
        train = first_rows(data, DEMO_FOLDER / file.format("train"), kind, notes)
        held_out = read_rows(data, DEMO_FOLDER / file.format("eval"), kind, notes)
        return Split(train, held_out, notes)
    assert data.path is not None  # validate() refuses a missing path
    if data.eval_path is not None:
        train = first_rows(data, data.path, kind, notes)
        return Split(train, read_rows(data, data.eval_path, kind, notes), notes)
    rows = parse_rows(data, data.path, notes)
    if data.max_rows is not None and data.max_rows < len(rows):
        notes.append(f"the first {data.max_rows} are used")
    as_kind(rows, kind, data.path)  # unfit rows are the first thing to hear of
    # Split before rows become another kind: every stage then holds out the same prompts.
    train, held_out = hold_out(rows[: data.max_rows], data.eval_rows, data.path)
    return Split(as_kind(train, kind, data.path), as_kind(held_out, kind, data.path), notes)


def first_rows(data: Data, path: str | Path, kind: type, notes: list[str]) -> list[Any]:
    """`kind` rows of the first `data.max_rows` rows."""
    rows = parse_rows(data, path, notes)
    if data.max_rows is not None and data.max_rows < len(rows):
        notes.append(f"the first {data.max_rows} are used")
    return as_kind(rows[: data.max_rows], kind, path)


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
    """All rows of one source as `kind`, derived where that is sound; `notes` gets the counts."""
    return as_kind(parse_rows(data, path, notes), kind, path)


def parse_rows(data: Data, path: str | Path, notes: list[str]) -> list[Row]:
    """All rows of one source, of the kinds that they are."""
    reader = FORMATS[data.format]
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for raw, source in read_raw(path):
        try:
            rows.append(reader(renamed(raw, data.columns, source), source))
        except RowError as error:
            if data.bad_rows == "error":
                raise
            dropped[str(error).removeprefix(f"{source}: ")] += 1
    kinds = Counter(type(row).__name__.lower() for row in rows)
    counts = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items()) or "no rows"
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
    notes.append(f"{path.name if isinstance(path, Path) else path}: {counts}{reasons}")
    return rows


def as_kind(rows: list[Row], kind: type, path: object) -> list[Any]:
    """Rows as `kind`; at least one.

    Raises:
        UserError: no row, or one that cannot be of this kind.
    """
    made, unfit = derive(rows, kind)
    if unfit:
        have = type(unfit[0]).__name__.lower()
        raise UserError(
            f"{unfit[0].source}: this is a {have} row; needed: {kind.__name__.lower()} rows "
            f"({EXPECTED[kind]})"
        )
    if not made:
        raise UserError(f"{path}: no usable {kind.__name__.lower()} row ({EXPECTED[kind]})")
    return made


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
    Preference: "{prompt, chosen, rejected} or {prompt, responses, ranks}",
    Ranking: "{prompt, responses, ranks}",
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
        return Demonstration(*split_turns(raw["messages"], "messages", source), source)
    prompt = prompt_of(raw, source)
    if "responses" in raw:
        return ranking_of(raw, prompt, source)
    if "completion" in raw:
        completion = text_of(raw, "completion", source)
        return Demonstration(prompt, completion, source, other_columns(raw))
    return Prompt(prompt, other_columns(raw), source)


def other_columns(raw: Raw) -> Raw:
    """What a row says beside prompt and completion: rules read it (answer, ...)."""
    return {name: value for name, value in raw.items() if name not in ("prompt", "completion")}


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


def preference_of(raw: Raw, source: str) -> Preference:
    """A comparison; full dialogues in messages share their prompt."""
    chosen, rejected = column(raw, "chosen", source), column(raw, "rejected", source)
    if "prompt" not in raw and isinstance(chosen, list):
        prompt, better = split_turns(chosen, "chosen", source)
        other, worse = split_turns(rejected, "rejected", source)
        if prompt != other:
            raise RowError(f"{source}: chosen and rejected differ before their last message")
        return Preference(prompt, better, worse, source)
    texts = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    return Preference(prompt_of(raw, source), *texts, source)


def ranking_of(raw: Raw, prompt: str | Turns, source: str) -> Ranking:
    """A ranking by ranks (1 is best) or by scores (higher is better)."""
    responses = column(raw, "responses", source)
    if not isinstance(responses, list) or len(responses) < 2:
        count = len(responses) if isinstance(responses, list) else "no list"
        raise RowError(f"{source}: a ranking needs 2 or more responses, got {count}")
    texts = [text_of({"responses": text}, "responses", source) for text in responses]
    by = "ranks" if "ranks" in raw else "scores"
    places = column(raw, by, source)
    if not isinstance(places, list) or len(places) != len(texts):
        raise RowError(f"{source}: column {by!r} needs one number for each of {len(texts)}")
    if not all(isinstance(place, int | float) for place in places):
        raise RowError(f"{source}: column {by!r} must hold numbers")
    sign = 1 if by == "ranks" else -1
    return Ranking(prompt, texts, [sign * float(place) for place in places], source)


def as_hh(raw: Raw, source: str) -> Preference:
    """A pair of Anthropic's HH dialogues, split before the assistant's last reply."""
    turn = "\n\nAssistant:"
    chosen, rejected = text_of(raw, "chosen", source), text_of(raw, "rejected", source)
    cut = chosen.rfind(turn) + len(turn)
    prompt = chosen[:cut]
    if turn not in chosen or not rejected.startswith(prompt):
        raise RowError(f"{source}: chosen and rejected do not share a dialogue up to {turn!r}")
    row = {"prompt": prompt, "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return preference_of(row, source)


def as_gsm8k(raw: Raw, source: str) -> Row:
    """A GSM8K problem: its solution is the demonstration, what follows #### the answer."""
    question, solution = text_of(raw, "question", source), text_of(raw, "answer", source)
    if "####" not in solution:
        raise RowError(f"{source}: column 'answer' has no '#### N'")
    answer = solution.split("####")[-1].strip()
    return Demonstration(question, solution, source, {"answer": answer})


FORMATS: dict[str, Callable[[Raw, str], Row]] = {
    "demo": as_row,
    "rows": as_row,
    "hh": as_hh,
    "gsm8k": as_gsm8k,
}
