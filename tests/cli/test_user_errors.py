"""What is wrong with rows and model folders, and the one line that says so.

Each case runs in a folder with a finished policy and reward model, after one change to it: status
2, one line on stderr with the given parts, nothing on stdout, and no file made, changed or gone.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.made import (
    LIMITS,
    MODEL,
    POLICY,
    REWARD,
    ROWS,
    SFT,
    contents,
    cpu_seconds,
)
from tests.conftest import Cli
from tests.pace import fast

OWN = f"data=jsonl data.path=own.jsonl {LIMITS} out=new"
OWN_SFT = f"sft {OWN}"
PPO = f"ppo {ROWS} algo.steps=1 algo.batch_size=4 algo.minibatch_size=4"
KTO, KWISE = f"dpo {ROWS} algo=kto out=new", f"reward {ROWS} algo=kwise out=new"

SECONDS, SECONDS_WITH_WEIGHTS = 2.0, 5.0  # of processor time

Change = Callable[[Path], object]


# --------------------------------------------------------------------------- changes to the folder


def as_it_is(folder: Path) -> None:
    """No change."""


def rows(*lines: object, name: str = "own.jsonl") -> Change:
    """Write a file of rows; a string is a line as it stands."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return write(name, "".join(line + "\n" for line in text))


def write(name: str, content: str | bytes) -> Change:
    """Put a file there, in a folder of its own if need be."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def gone(*names: str) -> Change:
    """Remove files or folders."""

    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(name: str, size: int) -> Change:
    """Keep the first bytes of a file, or all but the last where `size` is below 0."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def replaced(name: str, old: str, new: str) -> Change:
    """Put `new` in the place of `old` in a text file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def both(first: Change, second: Change) -> Change:
    """One change after the other."""
    return lambda folder: (first(folder), second(folder))


def flipped(name: str, place: int) -> Change:
    """Change one bit of a file; its size stays."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return change


def value(name: str, **entries: object) -> Change:
    """Set values in a JSON file."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | entries))

    return change


def unrecorded(name: str) -> Change:
    """Record no files of a folder, as in one of another tool."""
    return value(f"{name}/stage.json", files={})


def other_names(folder: Path) -> None:
    """The adapter's tensors as a model with a tower of vision calls them."""
    from safetensors.torch import load_file, save_file

    file = folder / ADAPTED / "adapter_model.safetensors"
    weights = {name.replace(".layers.", ".lm.layers."): w for name, w in load_file(file).items()}
    save_file(weights, file)


def folder_for(name: str) -> Change:
    """A folder where a file was."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def copied(name: str, to: str) -> Change:
    """A folder once more under another name."""
    return lambda folder: shutil.copytree(folder / name, folder / to)


# --------------------------------------------------------------------------- the table
# name -> (change, words after rlhf-cli, parts of the answer)

Case = tuple[Change, str, list[str]]

GIVEN = {"prompt": "Greet Ann: ", "completion": "Hi!"}
PAIR = {"prompt": "Greet Ann: ", "chosen": "Hi!", "rejected": "No."}
RANKING = {"prompt": "Greet Ann: ", "responses": ["Hi!", "No.", "Hm."], "ranks": [1, 3, 2]}
THUMBS = {**GIVEN, "label": True}
SCORED = {**GIVEN, "score": 3}
STEPS = {"prompt": "Greet Ann: ", "steps": ["Hi", "Ann!"], "labels": [1, 0]}
SMALL = f"{OWN} data.eval_rows=1"
PROBLEM = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
DIALOGUES = {
    "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello!",
    "rejected": "\n\nHuman: Hey.\n\nAssistant: No.",
}

ADAPTED = "runs/demo/adapter"
ON_NOTHING = {"base_model_name_or_path": "/no/base"}
LFS = "version https://git-lfs.github.com/spec/v1\n"
HEADER = (8).to_bytes(8, "little") + b'{"a": 3}'

FILES: dict[str, Case] = {
    "no file": (as_it_is, OWN_SFT, ["data.path", "no such file", "own.jsonl"]),
    "no held-out file": (
        as_it_is,
        f"{SFT} data.eval_path=e.jsonl out=new",
        ["data.eval_path", "e.jsonl"],
    ),
    "no text file": (
        as_it_is,
        f"{SFT} data.text_path=t.jsonl out=new",
        ["data.text_path", "t.jsonl"],
    ),
    "empty file": (write("own.jsonl", ""), OWN_SFT, ["own.jsonl is empty"]),
    "blank file": (rows("", " "), OWN_SFT, ["own.jsonl: the file has no rows"]),
    "unknown suffix": (
        write("own.txt", "prompt: Hi\n"),
        f"{OWN_SFT} data.path=own.txt",
        ["data.path: own.txt is neither JSON, CSV, TSV, Parquet nor Arrow"],
    ),
    "empty folder": (
        lambda folder: (folder / "mine").mkdir(),
        f"{OWN_SFT} data.path=mine",
        ["mine: no .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow file in this folder"],
    ),
    "not UTF-8": (
        write("own.jsonl", b'{"text": "\xff"}'),
        OWN_SFT,
        ["own.jsonl:1: not text in UTF-8"],
    ),
    "malformed JSON line": (rows(GIVEN, '{"prompt": '), OWN_SFT, ["own.jsonl:2: not JSON"]),
    "a line that is no object": (
        rows(GIVEN, [1]),
        OWN_SFT,
        ["own.jsonl:2: expected an object, got list"],
    ),
    "malformed JSON file": (
        write("own.json", "[{]"),
        f"{OWN_SFT} data.path=own.json",
        ["own.json:1: not JSON"],
    ),
    "JSON of several lists": (
        write("own.json", '{"a": [{"b": 1}], "c": [{"d": 1}]}'),
        f"{OWN_SFT} data.path=own.json",
        ["own.json: one object with several lists of objects (a, c)"],
    ),
    "an empty path": (as_it_is, f"{OWN_SFT} data.path=''", ["data.path is empty"]),
    "an empty list of paths": (as_it_is, f"{OWN_SFT} data.path=[]", ["data.path is empty"]),
    "paths without brackets": (
        rows(GIVEN),
        f"{OWN_SFT} data.path=own.jsonl,b.jsonl",
        ["for a list write 'data.path=[own.jsonl,b.jsonl]'"],
    ),
    "standard input for a stage that learns": (
        as_it_is,
        f"{OWN_SFT} data.path=-",
        ["data.path=-: generate alone reads standard input"],
    ),
    "an empty path in a list": (
        rows(GIVEN),
        f"{OWN_SFT} data.path=[own.jsonl,'']",
        ["data.path is empty"],
    ),
    "a path that is no text": (
        as_it_is,
        f"{OWN_SFT} data.path=[[own.jsonl]]",
        ["data.path[0] must be one value"],
    ),
    "a file named twice": (
        rows(GIVEN),
        f"{OWN_SFT} data.path=[own.jsonl,./own.jsonl]",
        ["data.path: own.jsonl is named twice"],
    ),
    "a pattern that nothing fits": (
        as_it_is,
        f"{OWN_SFT} data.path=new/*.jsonl",
        ["data.path: no file fits new/*.jsonl"],
    ),
    "text in UTF-16": (
        write("own.csv", "prompt,completion\na,b\n".encode("utf-16")),
        f"{OWN_SFT} data.path=own.csv",
        ["data.path: own.csv: not a text file in UTF-8 but in UTF-16"],
    ),
    "a spreadsheet": (
        write("own.csv", b"PK\x03\x04 and so on"),
        f"{OWN_SFT} data.path=own.csv",
        ["data.path: own.csv is a zip archive or a spreadsheet"],
    ),
    "CSV without the column": (
        write("own.csv", "question,completion\nHi,Ho\n"),
        f"{OWN_SFT} data.path=own.csv",
        ["own.csv:2: no column 'prompt'; found question, completion"],
    ),
    "damaged Parquet": (
        write("own.parquet", "PAR1 and so on"),
        f"{OWN_SFT} data.path=own.parquet",
        ["own.parquet: not Parquet"],
    ),
    "bad text row": (
        rows({"txt": "a"}, name="t.jsonl"),
        f"{SFT} data.text_path=t.jsonl out=new",
        ["t.jsonl:1: no column 'prompt'; found txt"],
    ),
    "an option that is no text": (
        write("mine/algo/own.yaml", b"lr: \xff\n"),
        "ppo --config-dir mine algo=own",
        ["mine/algo/own.yaml: not YAML", "can't decode byte 0xff"],
    ),
    "an option with a zero byte": (
        write("mine/algo/own.yaml", b"lr: \0\n"),
        "ppo --config-dir mine algo=own",
        ["mine/algo/own.yaml: not YAML"],
    ),
    "an option without end": (
        write("mine/algo/own.yaml", "[" * 10_000),
        "ppo --config-dir mine algo=own",
        ["mine/algo/own.yaml"],
    ),
    "an option that is a list": (
        write("mine/algo/own.yaml", "- lr\n"),
        "ppo --config-dir mine algo=own",
        ["mine/algo/own.yaml must hold KEY: VALUE lines"],
    ),
    "an option with a slip": (
        write("mine/algo/own.yaml", "lr: [1\nclip: 2\n"),
        "ppo --config-dir mine algo=own",
        ["mine/algo/own.yaml line 2: not YAML"],
    ),
    "an option with a key of nobody's": (
        write("mine/algo/own.yaml", "defaults: [ppo, _self_]\nklcoef: 0.1\n"),
        "ppo --config-dir mine algo=own",
        ["unknown key algo.klcoef", "did you mean algo.kl_coef?"],
    ),
}

BAD_ROWS: dict[str, Case] = {
    "UTF-16": (
        write("own.jsonl", json.dumps(GIVEN).encode("utf-16")),
        OWN_SFT,
        ["own.jsonl: not a text file in UTF-8"],
    ),
    "zero bytes": (write("own.jsonl", b"\0" * 64), OWN_SFT, ["own.jsonl:1: not JSON"]),
    "half a character": (
        rows('{"prompt": "a\\ud83d", "completion": "b"}'),
        OWN_SFT,
        ["own.jsonl:1: column 'prompt' holds half a character: \\ud83d"],
    ),
    "half a character in a message": (
        rows('{"messages": [{"role": "user", "content": "\\udc00"}]}'),
        OWN_SFT,
        ["own.jsonl:1: column 'messages' holds half a character"],
    ),
    "a message without text": (
        rows({"messages": [{"role": "user", "content": None}, {"role": "a", "content": "b"}]}),
        OWN_SFT,
        ["own.jsonl:1: column 'messages': content holds NoneType, expected text"],
    ),
    "messages that are none": (
        rows({"messages": ["a", "b"]}),
        OWN_SFT,
        ["own.jsonl:1: column 'messages' needs messages with role and content"],
    ),
    "lists in lists": (
        rows({"prompt": [[["a"]]], "completion": "b"}),
        OWN_SFT,
        ["own.jsonl:1: column 'prompt' needs messages"],
    ),
    "lists without end": (rows("[" * 100_000), OWN_SFT, ["own.jsonl:1: not JSON"]),
    "a number of 5000 digits": (
        rows(f'{{"prompt": "a", "completion": {"9" * 5000}}}'),
        OWN_SFT,
        ["own.jsonl:1: not JSON"],
    ),
    "a rank that no float holds": (
        rows(f'{{"prompt": "a", "responses": ["b", "c"], "ranks": [1, {"9" * 400}]}}'),
        f"reward {OWN} algo=kwise",
        ["own.jsonl:1: column 'ranks' must hold numbers"],
    ),
    "a rank that is no number": (
        rows('{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1e999]}'),
        f"reward {OWN} algo=kwise",
        ["own.jsonl:1: column 'ranks' must hold numbers"],
    ),
    "a score that is infinite": (
        rows('{"prompt": "a", "completion": "b", "label": true, "score": 1e999}'),
        f"reward {OWN} algo=pointwise",
        ["own.jsonl:1: column 'score' holds inf, expected a number"],
    ),
    "a step's label that is no number": (
        rows('{"prompt": "a", "steps": ["b"], "labels": [1e999]}'),
        f"reward {OWN} algo=process",
        ["own.jsonl:1: column 'labels' holds inf, expected"],
    ),
    "no steps": (
        rows({"prompt": "a", "steps": [], "labels": []}),
        f"reward {OWN} algo=process",
        ["own.jsonl:1: column 'steps' is empty"],
    ),
    "responses that are no list": (
        rows({"prompt": "a", "responses": 3, "ranks": [1]}),
        f"reward {OWN} algo=kwise",
        ["own.jsonl:1: column 'responses' holds int, expected a list"],
    ),
    "a source that is a list": (
        rows({**PAIR, "source": ["a"]}),
        f"reward {OWN}",
        ["own.jsonl:1: column 'source' holds list, expected text"],
    ),
    "text that is a number": (
        rows({"text": 3}),
        OWN_SFT,
        ["own.jsonl:1: column 'text' holds int, expected text"],
    ),
    "a folder of files without rows": (
        write("mine/own.jsonl", "\n"),
        f"{OWN_SFT} data.path=mine",
        ["mine/own.jsonl: the file has no rows"],
    ),
    "CSV without rows": (
        write("own.csv", "prompt,completion\n"),
        f"{OWN_SFT} data.path=own.csv",
        ["own.csv: the file has no rows"],
    ),
    "missing column": (
        rows(PAIR, {"prompt": "a", "chosen": "b"}),
        f"reward {OWN}",
        ["own.jsonl:2: no column 'rejected'; found prompt, chosen"],
    ),
    "renamed column that is not there": (
        rows(PROBLEM),
        f"ppo {OWN} data.columns.prompt=problem",
        ["own.jsonl:1: no column 'problem'; found question, answer"],
    ),
    "empty prompt": (
        rows({"prompt": " ", "completion": "a"}),
        OWN_SFT,
        ["own.jsonl:1: column 'prompt' is empty"],
    ),
    "empty completion": (
        rows(GIVEN, {"prompt": "a", "completion": ""}),
        OWN_SFT,
        ["own.jsonl:2: column 'completion' is empty"],
    ),
    "empty rejected": (
        rows({**PAIR, "rejected": ""}),
        f"dpo {OWN}",
        ["own.jsonl:1: column 'rejected' is empty"],
    ),
    "a number for a text": (
        rows({"prompt": "a", "completion": 3}),
        OWN_SFT,
        ["own.jsonl:1: column 'completion' holds int, expected text"],
    ),
    "ranking of one": (
        rows({"prompt": "a", "responses": ["b"], "ranks": [1]}),
        f"reward {OWN}",
        ["own.jsonl:1: a ranking needs 2 or more responses, got 1"],
    ),
    "ranking without a place": (
        rows({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}),
        f"reward {OWN}",
        ["own.jsonl:1: column 'ranks' needs one number for each of 2"],
    ),
    "messages that end with the user": (
        rows({"messages": [{"role": "user", "content": "a"}]}),
        OWN_SFT,
        ["own.jsonl:1: column 'messages' must end in a reply of the assistant"],
    ),
    "wrong kind for dpo": (
        rows(GIVEN),
        f"dpo {OWN}",
        ["own.jsonl:1: this is a demonstration row; needed: preference", "chosen, rejected"],
    ),
    "wrong kind for ppo": (
        rows({"text": "Once."}),
        f"ppo {OWN}",
        ["own.jsonl:1: this is a text row; needed: prompt rows"],
    ),
    "pairs where rankings are needed": (
        as_it_is,
        KWISE,
        [
            "rows.jsonl:1: this is a preference row; needed: ranking rows",
            "{prompt, responses, ranks}",
            "data.convert=[preference_to_ranking] makes them",
        ],
    ),
    "rankings where pairs are needed": (
        rows(RANKING),
        f"dpo {OWN}",
        ["own.jsonl:1: this is a ranking row", "data.convert=[ranking_to_preference] makes them"],
    ),
    "thumbs where pairs are needed": (
        rows(THUMBS),
        f"reward {OWN}",
        [
            "own.jsonl:1: this is a feedback row; needed: preference rows",
            "data.convert=[feedback_to_ranking,ranking_to_preference] makes them",
        ],
    ),
    "pairs where thumbs are needed": (
        as_it_is,
        KTO,
        ["this is a preference row", "data.convert=[preference_to_feedback] makes them"],
    ),
    "thumbs where steps are needed": (
        rows(THUMBS),
        f"reward {OWN} algo=process",
        [
            "this is a feedback row; needed: stepwise",
            "data.convert=[feedback_to_stepwise] makes them",
        ],
    ),
    "steps where thumbs are needed": (
        rows(STEPS),
        f"reward {OWN} algo=pointwise",
        ["own.jsonl:1: this is a stepwise row; needed: feedback", "label: true | false"],
    ),
    "two kinds in one file": (
        rows(RANKING, PAIR),
        f"reward {OWN} algo=plackett_luce",
        ["own.jsonl:2: this is a preference row; needed: ranking", "[preference_to_ranking]"],
    ),
    "a conversion that finds no rows": (
        as_it_is,
        f"reward {ROWS} data.convert=[ranking_to_preference] out=new",
        ["data.convert: ranking_to_preference found no ranking rows in rows.jsonl"],
    ),
    "a conversion too many": (
        as_it_is,
        f"dpo {ROWS} data.convert=[preference_to_ranking] out=new",
        [
            "rows.jsonl:1: this is a preference row, and a ranking row after",
            "data.convert=[] keeps them",
        ],
    ),
    "a conversion that leaves nothing": (
        rows(THUMBS, {**THUMBS, "prompt": "Greet Bob: "}),
        f"reward {SMALL} algo=kwise data.convert=[feedback_to_ranking]",
        ["own.jsonl: no usable ranking row", "2 prompts with fewer than 2 answers dropped"],
    ),
    "thumbs that are neither up nor down": (
        rows({**GIVEN, "label": "maybe"}),
        f"dpo {OWN} algo=kto",
        ["own.jsonl:1: column 'label' holds 'maybe', expected true or false, yes or no"],
    ),
    "a margin below 0": (
        rows({**PAIR, "margin": -1}),
        f"reward {OWN} algo.row_margin=true",
        ["own.jsonl:1: column 'margin' holds -1, expected 0 or more"],
    ),
    "a margin that is no number": (
        rows({**PAIR, "margin": "much"}),
        f"reward {OWN}",
        ["own.jsonl:1: column 'margin' holds 'much', expected a number"],
    ),
    "a step without a label": (
        rows({**STEPS, "labels": [1]}),
        f"reward {OWN} algo=process",
        ["own.jsonl:1: column 'labels' holds 1 for 2 steps"],
    ),
    "a step's label above 1": (
        rows({**STEPS, "labels": [1, 2]}),
        f"reward {OWN} algo=process",
        ["own.jsonl:1: column 'labels' holds 2, expected true, false or a number from 0"],
    ),
    "a doubtful pair": (
        rows(PAIR, {**PAIR, "prompt": "Greet Bob: ", "rejected": "Hi!"}, {**PAIR, "prompt": "Hey"}),
        f"dpo {SMALL} data.doubtful_pairs=error",
        ["one of 1 rows that judge a text against itself", "data.doubtful_pairs=keep or drop"],
    ),
    "a pair both ways": (
        rows(
            *(PAIR, {**PAIR, "chosen": "No.", "rejected": "Hi!"}),
            *({**PAIR, "prompt": f"Greet {name}: "} for name in ("Bob", "Cid")),
        ),
        f"dpo {SMALL} data.doubtful_pairs=error",
        ["own.jsonl:1: one of 2 rows that are judged both ways", "keep or drop goes on"],
    ),
    "length alone": (
        rows(*({**PAIR, "prompt": f"{n}", "chosen": "Hi, my friend!"} for n in range(40))),
        f"dpo {SMALL} data.doubtful_pairs=error",
        ["the longer side is better here and in 40 of 40 pairs", "data.doubtful_pairs=keep"],
    ),
    "doubtful pairs alone": (
        rows({**PAIR, "rejected": "Hi!"}, {**PAIR, "prompt": "Greet Bob: ", "rejected": "Hi!"}),
        f"dpo {SMALL} data.doubtful_pairs=drop",
        ["own.jsonl", "data.doubtful_pairs=drop leaves none of 2 rows"],
    ),
    "gsm8k without ####": (
        rows(PROBLEM, {"question": "2 + 2?", "answer": "4"}),
        f"{OWN_SFT} data.format=gsm8k",
        ["own.jsonl:2: column 'answer' has no '#### N'"],
    ),
    "hh without a shared prompt": (
        rows(DIALOGUES),
        f"reward data=hh data.path=own.jsonl data.bad_rows=error out=new {LIMITS}",
        ["own.jsonl:1: chosen and rejected do not share a dialogue"],
    ),
    "hh with no row left": (
        rows(DIALOGUES),
        f"reward data=hh data.path=own.jsonl out=new {LIMITS}",
        ["own.jsonl: no usable preference row"],
    ),
    "nothing left to train on": (
        rows(PAIR, PAIR),
        f"reward {OWN}",
        ["own.jsonl: holding out 1 of 1 prompts leaves none to train on", "give data.eval_path"],
    ),
    "no answer to check": (
        rows({"prompt": "1 + 1?"}, {"prompt": "2 + 2?"}),
        f"grpo {OWN} data.eval_rows=1",
        ["own.jsonl:", "reward=exact_answer needs a column 'answer'; found prompt"],
    ),
}

RULES: dict[str, Case] = {
    "an argument for math": (
        as_it_is,
        f"grpo {ROWS} reward=math_answer:x",
        ["math_answer takes no argument"],
    ),
    "a length of 5000 digits": (
        as_it_is,
        f"{PPO} reward=length:{'9' * 5000}",
        ["length needs a number of words"],
    ),
    "repetition of nothing": (as_it_is, f"{PPO} reward=repetition:0", ["repetition needs the"]),
    "length below 0": (as_it_is, f"{PPO} reward=length:-3", ["length needs a number of words"]),
    "JSON without keys": (as_it_is, f"{PPO} reward=json:|", ["json takes keys"]),
    "tags twice": (as_it_is, f"{PPO} reward=tags:a|a", ["tags needs names of tags"]),
    "tags without names": (as_it_is, f"{PPO} reward=tags", ["tags needs names of tags"]),
    "a tolerance below 0": (
        as_it_is,
        f"grpo {ROWS} reward=numeric_answer:-1",
        ["numeric_answer needs a tolerance"],
    ),
    "no lexicon": (as_it_is, f"{PPO} reward=lexicon:no.txt", ["lexicon:no.txt: no such text file"]),
    "a lexicon that is no text": (
        write("words.txt", b"\xff\xfe"),
        f"{PPO} reward=lexicon:words.txt",
        ["lexicon:words.txt: no such text file"],
    ),
    "a lexicon with a word twice": (
        write("words.txt", "good\nGood\n"),
        f"{PPO} reward=lexicon:words.txt",
        ["words.txt line 2: 'good' is there already"],
    ),
    "an empty lexicon": (
        write("words.txt", "# none\n"),
        f"{PPO} reward=lexicon:words.txt",
        ["lexicon:words.txt: the file holds no words"],
    ),
    "an infinite weight": (as_it_is, f"{PPO} reward=inf*json", ["'inf' is no weight"]),
    "a function that is no Python": (
        write("a.py", "def f(prompts, responses:\n"),
        f"{PPO} reward=a.py:f",
        ["reward=a.py:f: a.py line 1 is not Python"],
    ),
    "a function file that is no text": (
        write("a.py", b"\0\xff"),
        f"{PPO} reward=a.py:f",
        ["reward=a.py:f: a.py line 1 is not Python"],
    ),
    "a function file that is a folder": (
        lambda folder: (folder / "a.py").mkdir(),
        f"{PPO} reward=a.py:f",
        ["reward=a.py:f: no such file: a.py"],
    ),
    "a function of nothing": (
        write("a.py", "def f(): ...\n"),
        f"{PPO} reward=a.py:f",
        ["reward=a.py:f() names nothing to judge"],
    ),
    "a reward too long for a path": (
        as_it_is,
        f"{PPO} reward={'x' * 300}",
        ["is no rule, and cannot be a path: it is too long"],
    ),
    "keywords without words": (as_it_is, f"{PPO} reward=keywords", ["keywords needs words"]),
    "bad pattern": (as_it_is, f'{PPO} reward="regex:["', ["regex:[", "not a regular expression"]),
    "length without a number": (as_it_is, f"{PPO} reward=length:x", ["length needs a number"]),
    "an argument too many": (
        as_it_is,
        f"grpo {ROWS} reward=exact_answer:x",
        ["exact_answer takes no argument, got 'x'"],
    ),
    "a tolerance for text": (
        rows({"prompt": "Where?", "answer": "Paris"}, {"prompt": "And?", "answer": "Rome"}),
        f"grpo {OWN} data.eval_rows=1 reward=numeric_answer:0.1",
        ["own.jsonl:", "needs a number in column 'answer', got"],
    ),
    "a lexicon without weights": (
        write("words.txt", "good\tvery\n"),
        f"{PPO} reward=lexicon:words.txt",
        ["words.txt line 1: 'very' is no weight"],
    ),
    "a weight that is none": (as_it_is, f"{PPO} reward=x*json", ["'x' is no weight"]),
    "no function file": (as_it_is, f"{PPO} reward=a.py:f", ["no such file: a.py"]),
    "no function": (
        write("a.py", "raise RuntimeError('never imported')\n\ndef g(prompts, responses): ...\n"),
        f"{PPO} reward=0.5*a.py:f",
        ["reward=a.py:f: a.py defines no function f (functions: g)"],
    ),
    "a function's column": (
        write("a.py", "def f(prompts, responses, answer): ...\n"),
        f"{PPO} reward=a.py:f",
        ["rows.jsonl:", "reward=a.py:f needs a column 'answer'; found prompt"],
    ),
    "no time for a function": (
        as_it_is,
        f"{PPO} reward_timeout=0",
        ["reward_timeout must be a number > 0"],
    ),
    "nothing to judge by": (
        as_it_is,
        f"evaluate {ROWS} policy={POLICY} reward=null gold=null",
        ["evaluate needs reward=... or gold=..."],
    ),
}

FOLDERS: dict[str, Case] = {
    "no policy": (gone(POLICY), PPO, [f"policy={POLICY} does not exist: run `rlhf-cli sft` first"]),
    "no policy of that name": (as_it_is, f"{PPO} name=x", ["run `rlhf-cli sft name=x` first"]),
    "no policy anywhere": (
        as_it_is,
        f"{PPO} policy=./nowhere",
        ["policy=./nowhere does not exist: run `rlhf-cli sft out=./nowhere`"],
    ),
    "no reward": (
        gone("runs/demo/reward"),
        PPO,
        ["reward=runs/demo/reward does not exist: run `rlhf-cli reward` first", "keywords:..."],
    ),
    "no baseline": (
        as_it_is,
        f"evaluate {ROWS} policy={POLICY} baselines=[runs/demo/dpo]",
        ["baselines[0]=runs/demo/dpo does not exist: run `rlhf-cli dpo` first"],
    ),
    "a file for a policy": (as_it_is, f"{PPO} policy=rows.jsonl", ["rows.jsonl is a file"]),
    "a folder of nothing": (
        lambda folder: (folder / "empty").mkdir(),
        f"{PPO} policy=empty",
        ["policy=empty holds no finished model"],
    ),
    "an unfinished policy": (
        gone(f"{POLICY}/stage.json"),
        PPO,
        [f"policy={POLICY} holds no finished model; the command that began it goes on"],
    ),
    "a reward model for a policy": (
        as_it_is,
        f"{PPO} policy=runs/demo/reward",
        ["policy=runs/demo/reward is a reward model; policy needs an sft, ppo, dpo or grpo output"],
    ),
    "a policy for a reward model": (
        as_it_is,
        f"{PPO} reward={POLICY}",
        [
            f"reward={POLICY} is a policy; reward needs a reward output, a dpo output with",
            "a rule, or file.py:function",
        ],
    ),
    "a foreign reward model for a policy": (
        gone("runs/demo/reward/stage.json", "runs/demo/reward/config.yaml"),
        f"dpo {ROWS} policy=runs/demo/reward",
        ["policy=runs/demo/reward is a reward model"],
    ),
    "another tokenizer for a reference": (
        both(
            both(copied(POLICY, "other"), unrecorded("other")),
            replaced("other/tokenizer.json", '"merges": [', '"merges": [["q","q"],'),
        ),
        f"dpo {ROWS} out=new reference=other",
        [f"reference=other has another tokenizer than policy={POLICY}"],
    ),
    "no reference": (
        as_it_is,
        f"dpo {ROWS} out=new reference=runs/demo/ppo",
        ["reference=runs/demo/ppo does not exist: run `rlhf-cli ppo` first"],
    ),
    "a reward model for a reference": (
        as_it_is,
        f"dpo {ROWS} out=new reference=runs/demo/reward",
        ["reference=runs/demo/reward is a reward model; reference needs an sft, ppo, dpo or grpo"],
    ),
    "a reference that is out": (
        as_it_is,
        f"dpo {ROWS} reference=runs/demo/adapter out=runs/demo/adapter overwrite=true",
        ["out=runs/demo/adapter holds the reference that this stage reads"],
    ),
    "a dpo output without an implicit reward": (
        replaced("runs/demo/adapter/stage.json", '"implicit_reward"', '"of_simpo"'),
        f"{PPO} reward=runs/demo/adapter",
        ["reward=runs/demo/adapter is a policy; reward needs", "a dpo output with a reference"],
    ),
    "a policy for what chooses sft's weights": (
        as_it_is,
        f"{SFT} out=new select_by=reward reward={POLICY}",
        [f"reward={POLICY} is a policy; reward needs"],
    ),
    "no weights": (
        both(unrecorded(POLICY), gone(f"{POLICY}/model.safetensors")),
        PPO,
        [f"{POLICY}: no weights (*.safetensors) in this folder"],
    ),
    "truncated weights": (
        both(unrecorded(POLICY), cut(f"{POLICY}/model.safetensors", -100)),
        PPO,
        [f"{POLICY}/model.safetensors: truncated weights", "bytes of"],
    ),
    "weights that are none": (
        both(unrecorded(POLICY), write(f"{POLICY}/model.safetensors", LFS)),
        PPO,
        [f"{POLICY}/model.safetensors: damaged weights"],
    ),
    "a shard missing": (
        write(f"{POLICY}/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        PPO,
        [f"{POLICY}: weights missing: b.safetensors"],
    ),
    "damaged config.json": (
        both(unrecorded(POLICY), cut(f"{POLICY}/config.json", 50)),
        PPO,
        ["config.json: damaged"],
    ),
    "damaged stage.json": (cut(f"{POLICY}/stage.json", 50), PPO, ["stage.json: damaged"]),
    "damaged tokenizer.json": (
        both(unrecorded(POLICY), cut(f"{POLICY}/tokenizer.json", 50)),
        PPO,
        ["tokenizer.json: damaged"],
    ),
    "damaged adapter": (
        cut("runs/demo/adapter/adapter_config.json", 50),
        f"{PPO} policy=runs/demo/adapter",
        ["adapter_config.json: damaged"],
    ),
    "weights of no bytes": (
        write(f"{POLICY}/model.safetensors", b""),
        PPO,
        [f"{POLICY}/model.safetensors"],
    ),
    "a model of a thousand million labels": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", num_labels=10**9)),
        f"generate {ROWS} out=new policy={POLICY}",
        [f"{POLICY}/config.json: num_labels=1000000000 is more than the weights in"],
    ),
    "weights that are a folder": (
        both(unrecorded(POLICY), folder_for(f"{POLICY}/model.safetensors")),
        PPO,
        [f"{POLICY}/model.safetensors is a folder, not a file; remove it, or put the file back"],
    ),
    "weights with entries that are none": (
        both(unrecorded(POLICY), write(f"{POLICY}/model.safetensors", HEADER)),
        PPO,
        ["model.safetensors: damaged weights (unreadable header: a is 3, not an object)"],
    ),
    "a shard list of another form": (
        write(f"{POLICY}/model.safetensors.index.json", '{"weight_map": ["a"]}'),
        PPO,
        ["model.safetensors.index.json: damaged: weight_map is ['a'], not an object"],
    ),
    "a recorded config.json with a bit flipped": (
        flipped(f"{POLICY}/config.json", 20),
        PPO,
        [f"{POLICY}/config.json is damaged", "overwrite=true", '"files" in'],
    ),
    "a recorded tokenizer_config.json that is gone": (
        gone(f"{POLICY}/tokenizer_config.json"),
        PPO,
        [f"{POLICY}/tokenizer_config.json is missing", "overwrite=true"],
    ),
    "recorded weights that are cut": (
        cut(f"{POLICY}/model.safetensors", -1),
        PPO,
        [f"{POLICY}/model.safetensors has", "bytes instead of"],
    ),
    "config.json below 0": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", vocab_size=-1)),
        PPO,
        ["config.json: damaged: vocab_size is -1, not a whole number from 1 to 2^31"],
    ),
    "config.json beyond all memory": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", vocab_size=10**12)),
        PPO,
        ["config.json: damaged: vocab_size is 1000000000000, not"],
    ),
    "config.json of other weights": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", num_hidden_layers=10**6)),
        PPO,
        ["config.json: num_hidden_layers=1000000 is more than the weights in"],
    ),
    "config.json in words": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", max_position_embeddings="64")),
        PPO,
        ["config.json: damaged: max_position_embeddings is '64', not a whole number"],
    ),
    "tokenizer.json of another form": (
        both(unrecorded(POLICY), value(f"{POLICY}/tokenizer.json", model=[])),
        PPO,
        ["tokenizer.json: damaged: model is [], not an object"],
    ),
    "an adapter whose base is gone": (
        both(unrecorded(ADAPTED), value(f"{ADAPTED}/adapter_config.json", **ON_NOTHING)),
        f"dpo {ROWS} out=new policy={ADAPTED}",
        [f"{ADAPTED} is an adapter on /no/base, which is gone"],
    ),
    "an adapter that names no base": (
        both(
            unrecorded(ADAPTED),
            value(f"{ADAPTED}/adapter_config.json", base_model_name_or_path=None),
        ),
        f"dpo {ROWS} out=new policy={ADAPTED}",
        ["adapter_config.json: damaged: base_model_name_or_path is None, not a path"],
    ),
    "an adapter beyond all memory": (
        both(unrecorded(ADAPTED), value(f"{ADAPTED}/adapter_config.json", r=10**9)),
        f"dpo {ROWS} out=new policy={ADAPTED}",
        ["adapter_config.json: r=1000000000 is more than the weights in"],
    ),
    "an adapter without weights": (
        both(unrecorded(ADAPTED), gone(f"{ADAPTED}/adapter_model.safetensors")),
        f"dpo {ROWS} out=new policy={ADAPTED}",
        [f"{ADAPTED}: no weights"],
    ),
    "stage.json with parents in number": (
        value(f"{POLICY}/stage.json", parents=3),
        PPO,
        ["stage.json: damaged: parents is 3, not an object"],
    ),
    "stage.json with a reward in words": (
        value("runs/demo/reward/stage.json", reward="x"),
        PPO,
        ["stage.json: damaged: reward is 'x', not an object"],
    ),
    "stage.json without a kind": (
        write(f"{POLICY}/stage.json", "{}"),
        PPO,
        ["stage.json: damaged: kind is missing"],
    ),
    "stage.json with a bit flipped": (
        flipped(f"{POLICY}/stage.json", 0),
        PPO,
        ["stage.json: damaged: this is no JSON"],
    ),
    "samples for a policy": (
        value(f"{POLICY}/stage.json", kind="samples"),
        PPO,
        [f"policy={POLICY} is a samples; policy needs"],
    ),
    "a damaged stage.json of out": (
        cut(f"{POLICY}/stage.json", 50),
        SFT,
        [f"{POLICY}/stage.json: damaged"],
    ),
    "too few positions": (
        as_it_is,
        f"{PPO} data.max_prompt_tokens=60",
        ["data.max_prompt_tokens=60", "responses of 8 tokens do not fit the 64 positions"],
    ),
}

OUT: dict[str, Case] = {
    "of another config": (
        as_it_is,
        f"{SFT} seed=3 algo.lr=1e-5",
        [f"out={POLICY} was made by another config (algo.lr: 0.005 -> 1e-05, seed: 0 -> 3)"],
    ),
    "of another stage": (
        as_it_is,
        f"{REWARD} out={ADAPTED}",
        [f"out={ADAPTED} is the folder of another stage; name another out"],
    ),
    "from a policy that has changed": (
        replaced(f"{POLICY}/config.json", '"architectures"', '"note": 1, "architectures"'),
        REWARD,
        ["runs/demo/reward was made from another policy", "overwrite=true"],
    ),
    "is the policy": (as_it_is, f"{PPO} out={POLICY}", ["holds the policy that this stage reads"]),
    "holds the policy": (as_it_is, f"{PPO} out=runs", ["holds the policy that this stage reads"]),
    "is the policy, overwritten": (
        as_it_is,
        f"{PPO} out={POLICY} overwrite=true",
        ["holds the policy that this stage reads; name another out"],
    ),
    "is a file": (as_it_is, f"{SFT} out=rows.jsonl", ["rows.jsonl is not a folder"]),
    "lies in a file": (as_it_is, f"{SFT} out=rows.jsonl/x", ["rows.jsonl is not a folder"]),
    "is somebody else's": (
        write("thesis/chapter.tex", "By me."),
        f"{SFT} out=thesis",
        ["out=thesis is not empty and not a stage's folder; name another out"],
    ),
    "is somebody else's, overwritten": (
        write("thesis/chapter.tex", "By me."),
        f"{SFT} out=thesis overwrite=true",
        ["out=thesis is not empty and not a stage's folder; name another out"],
    ),
    "has somebody else's config.yaml": (
        write("project/config.yaml", "# of my project\nkey: value\n"),
        f"{SFT} out=project overwrite=true",
        ["out=project is not empty and not a stage's folder"],
    ),
    "has a damaged config.yaml": (
        write(f"{POLICY}/config.yaml", "# rlhf-cli sft\n{"),
        SFT,
        [f"{POLICY}/config.yaml: damaged; set overwrite=true"],
    ),
    "in a sweep": (
        write("sweep/seed=2/chapter.tex", "By me."),
        f"{SFT} -m out=sweep seed=1,2",
        ["out=sweep/seed=2 is not empty and not a stage's folder"],
    ),
    "kept when it was to go on and the rows are bad": (
        both(gone(f"{POLICY}/stage.json"), cut("rows.jsonl", 20)),
        SFT,
        ["rows.jsonl:1: not JSON"],
    ),
    "kept when overwriting fails": (
        rows(GIVEN, "{"),
        f"{OWN_SFT} {MODEL} out={POLICY} overwrite=true",
        ["own.jsonl:2: not JSON"],
    ),
}

EARLY = {**FILES, **BAD_ROWS, **RULES, **FOLDERS, **OUT}

LONG = {"prompt": "Greet " + "x " * 40, "chosen": "Hi!", "rejected": "No."}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

# Found once the tokenizer or the weights are loaded.
LATE: dict[str, Case] = {
    "long prompt": (
        rows(PAIR, LONG),
        f"reward {OWN} data.eval_rows=1",
        ["own.jsonl:2: the prompt has", "the limit is 32", "data.long_prompts=cut or drop"],
    ),
    "long prompts only": (
        rows(LONG, {**LONG, "prompt": LONG["prompt"] + "y"}),
        f"dpo {OWN} data.eval_rows=1 data.long_prompts=drop",
        ["nothing is left of 2 rows: a prompt is longer than data.max_prompt_tokens=32"],
    ),
    "messages without a chat template": (
        rows(TALK, {"messages": [*TALK["messages"], *TALK["messages"]]}),
        f"{OWN_SFT} data.eval_rows=1 model=pretrained model.path={POLICY}",
        ["the rows are messages", "no chat template"],
    ),
    "chat without a chat template": (
        as_it_is,
        f"dpo {ROWS} data.template=chat",
        ["data.template=chat", "no chat template"],
    ),
    "a hub id out of reach": (
        as_it_is,
        f"generate {ROWS} policy=nobody/nothing",
        ["nobody/nothing: no usable tokenizer"],
    ),
    "a dataset out of reach": (
        as_it_is,
        f"dpo data=jsonl data.path=nobody/nothing {LIMITS}",
        ["no file nobody/nothing, and no hub dataset of that name"],
    ),
    "an adapter of another rank": (
        as_it_is,
        f"{PPO} policy=runs/demo/adapter model=lora model.lora_rank=4",
        ["runs/demo/adapter: its adapter goes on as it is, with rank 2, alpha 32.0", "lora_rank=4"],
    ),
    "an adapter of another kind that is to go on": (
        both(unrecorded(ADAPTED), value(f"{ADAPTED}/adapter_config.json", peft_type="IA3")),
        f"{PPO} policy=runs/demo/adapter model=lora",
        ["runs/demo/adapter is an adapter of the kind IA3", "model.adapter=merge"],
    ),
    "what to do with an adapter that there is none of": (
        as_it_is,
        f"{PPO} policy={POLICY} model=lora model.adapter=stack",
        [f"model.adapter=stack is for a policy that is an adapter folder, and {POLICY} is none"],
    ),
    "an adapter whose base would be on no disk": (
        as_it_is,
        f"{PPO} policy=runs/demo/adapter model=lora model.adapter=merge",
        ["model.adapter=merge with model.merge_lora=false", "set model.merge_lora=true"],
    ),
    "few bits without the package": (
        as_it_is,
        f"{PPO} policy={POLICY} model=qlora",
        ["model.quantize=nf4 needs bitsandbytes: pip install 'rlhf-cli[qlora]'"],
    ),
    "a folder of adapters": (
        lambda place: shutil.copytree(place / ADAPTED, place / "several/one"),
        f"{PPO} policy=several",
        ["policy=several holds adapters in folders of their own; name one: several/one"],
    ),
    "one class for kto": (
        rows(*({**THUMBS, "prompt": f"Greet {name}: "} for name in "ABCD")),
        f"dpo {OWN} data.eval_rows=2 algo=kto",
        ["all 2 rows are labelled true", "algo.desirable_weight and algo.undesirable_weight"],
    ),
    "scores for kto": (
        rows(*({**SCORED, "prompt": f"Greet {name}: "} for name in "ABCD")),
        f"dpo {OWN} data.eval_rows=2 algo=kto",
        ["own.jsonl:1: the row says no label, which algo.loss=kto reads"],
    ),
    "one prompt for kto": (
        both(
            rows(THUMBS, {**THUMBS, "completion": "No.", "label": False}),
            rows(THUMBS, {**THUMBS, "prompt": "Greet Bob: "}, name="held_out.jsonl"),
        ),
        f"dpo {OWN} data.eval_path=held_out.jsonl algo=kto",
        ["all training rows have one prompt; kto compares with responses to other prompts"],
    ),
    "scores where labels are fitted": (
        rows(SCORED, {**SCORED, "prompt": "Greet Bob: "}),
        f"reward {SMALL} algo=pointwise",
        ["own.jsonl:", "the row says no label, which algo.target=label reads"],
    ),
    "labels where scores are fitted": (
        rows({**THUMBS, "score": 1}, {**THUMBS, "prompt": "Greet Bob: "}),
        f"reward {SMALL} algo=pointwise algo.target=score",
        ["own.jsonl:2: the row says no score, which algo.target=score reads"],
    ),
    "margins that rows do not have": (
        as_it_is,
        f"reward {ROWS} algo.row_margin=true out=new",
        ["rows.jsonl:", "the row says no margin, which algo.row_margin=true reads"],
    ),
    "soft labels that rows do not have": (
        rows(PAIR, {**PAIR, "prompt": "Greet Bob: "}),
        f"reward {SMALL} algo.soft_labels=true out=new",
        ["own.jsonl:", "the row says no p, which algo.soft_labels=true reads"],
    ),
    "soft labels that pairs for dpo do not have": (
        rows(PAIR, {**PAIR, "prompt": "Greet Bob: "}),
        f"dpo {SMALL} algo.soft_labels=true",
        ["own.jsonl:", "the row says no p, which algo.soft_labels=true reads"],
    ),
    "soft labels for a hinge": (
        as_it_is,
        f"dpo {ROWS} algo=hinge algo.soft_labels=true out=new",
        ["algo.soft_labels is not used by algo.loss=hinge; set it to false, as algo=hinge does"],
    ),
    "two doubts about pairs for dpo": (
        as_it_is,
        f"dpo {ROWS} algo.soft_labels=true algo.label_smoothing=0.1 out=new",
        ["algo.soft_labels=true takes that of each: set one of them to 0 or false"],
    ),
    "two doubts about labels": (
        as_it_is,
        f"reward {ROWS} algo.soft_labels=true algo.label_smoothing=0.1 out=new",
        ["algo.soft_labels=true takes that of each: set one of them to 0 or false"],
    ),
    "steps that are cut otherwise": (
        rows(*({**STEPS, "prompt": f"{n}", "steps": ["Hi\nyou", "Ann!"]} for n in range(2))),
        f"reward {SMALL} algo=process",
        ["own.jsonl:", "these 2 steps, joined by data.step_join='\\n', are not those", "(3 steps)"],
    ),
    "an implicit reward whose reference has changed": (
        both(
            copied(POLICY, "other"),
            replaced(f"{POLICY}/config.json", '"architectures"', '"note": 1, "architectures"'),
        ),
        f"{PPO} policy=other reward=runs/demo/adapter",
        [
            "runs/demo/adapter as a reward is beta log(policy / reference)",
            "sft has changed since; run dpo again, or give a reward model",
        ],
    ),
    "an implicit reward whose reference is gone": (
        both(copied(POLICY, "other"), gone(POLICY)),
        f"{PPO} policy=other reward=runs/demo/adapter",
        ["sft is gone; run dpo again, or give a reward model"],
    ),
    "an implicit reward whose reference is gone, while sampling": (
        both(copied(POLICY, "other"), gone(POLICY)),
        f"generate {ROWS} policy=other reward=runs/demo/adapter",
        ["sft is gone; run dpo again, or give a reward model"],
    ),
    "a chooser whose column is not there": (
        as_it_is,
        f"{SFT} out=new select_by=reward reward=exact_answer",
        ["rows.jsonl:", "reward=exact_answer needs a column 'answer'"],
    ),
    "a chooser without a prompt to answer": (
        rows(*({"text": f"Once {n}."} for n in range(4))),
        f"{SFT} data.path=own.jsonl data.eval_rows=2 out=new select_by=reward reward=regex:a",
        ["select_by=reward judges responses, but no held-out row has a prompt"],
    ),
    "a cache that is a file": (
        as_it_is,
        f"dpo {ROWS} out=new algo.precompute_reference=true reference_cache=rows.jsonl",
        ["reference_cache=rows.jsonl"],
    ),
    "recorded weights with a bit flipped": (
        flipped(f"{POLICY}/model.safetensors", -1),
        f"dpo {ROWS}",
        [f"{POLICY}/model.safetensors is damaged", "overwrite=true"],
    ),
    "a recorded adapter with a bit flipped": (
        flipped(f"{ADAPTED}/adapter_model.safetensors", -1),
        f"dpo {ROWS} out=new policy={ADAPTED}",
        [f"{ADAPTED}/adapter_model.safetensors is damaged"],
    ),
    "an adapter whose tensors have other names": (
        both(unrecorded(ADAPTED), other_names),
        f"generate {ROWS} out=new policy={ADAPTED}",
        [
            f"{ADAPTED}: the adapter does not fit its base: 14 tensors missing, such as",
            "14 tensors of layers that are not there, such as base_model.model.model.lm.layers.0",
        ],
    ),
    "a tokenizer class that is not the file's": (
        both(
            unrecorded(POLICY),
            value(f"{POLICY}/tokenizer_config.json", tokenizer_class="ByT5Tokenizer"),
        ),
        f"generate {ROWS} out=new policy={POLICY}",
        [f"{POLICY}: tokenizer_config.json names the class ByT5Tokenizer, which does not fit"],
    ),
    "a pattern of layers that never ends": (
        both(
            unrecorded(ADAPTED),
            value(f"{ADAPTED}/adapter_config.json", target_modules=r"([a-z_.]+)*\d+([a-z_.]+)*!"),
        ),
        f"generate {ROWS} out=new policy={ADAPTED}",
        [f"{ADAPTED}: cannot load the adapter: the pattern", "does not end within 10 s"],
    ),
    "a chat template that never ends": (
        both(
            unrecorded(POLICY),
            value(
                f"{POLICY}/tokenizer_config.json",
                chat_template="{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}"
                "{% endfor %}",
            ),
        ),
        f"generate {ROWS} out=new policy={POLICY} data.template=chat",
        ["the chat template of", "fails: it does not end within 10 s of processor time"],
    ),
    "narrower weights": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", intermediate_size=40)),
        f"dpo {ROWS}",
        [f"{POLICY}: 3 weights missing or misshapen, such as model.layers.0.mlp.down_proj"],
    ),
    "a model that nobody knows": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", model_type="nobodys")),
        f"dpo {ROWS}",
        [POLICY, "nobodys"],
    ),
    "a tokenizer of another kind": (
        both(unrecorded(POLICY), value(f"{POLICY}/tokenizer.json", model={"type": "nobodys"})),
        f"dpo {ROWS}",
        [f"{POLICY}: no usable tokenizer"],
    ),
    "a chat template that fails": (
        both(
            unrecorded(POLICY),
            value(f"{POLICY}/tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        ),
        f"dpo {ROWS} data.template=chat",
        ["the chat template of", "fails: division by zero"],
    ),
    "a generation_config.json that is none": (
        both(unrecorded(POLICY), cut(f"{POLICY}/generation_config.json", 20)),
        f"dpo {ROWS}",
        [f"{POLICY}/generation_config.json: damaged: this is no JSON"],
    ),
    "a function that cannot be imported": (
        write("a.py", "import nobodys\n\ndef f(prompts, responses): ...\n"),
        f"{PPO} reward=a.py:f",
        ["a.py: ModuleNotFoundError: No module named 'nobodys'"],
    ),
    "a function file that raises": (
        write("a.py", "1 / 0\n\ndef f(prompts, responses): ...\n"),
        f"{PPO} reward=a.py:f",
        ["a.py: ZeroDivisionError: division by zero"],
    ),
    "an activation that nobody knows": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", hidden_act="x")),
        f"dpo {ROWS}",
        [f"{POLICY}: cannot load the model"],
    ),
    "weights that were never saved": (
        both(unrecorded(POLICY), value(f"{POLICY}/config.json", num_hidden_layers=2)),
        f"dpo {ROWS}",
        [f"{POLICY}:", "weights missing or misshapen"],
    ),
}


# name -> what happens instead
def check_line(stderr: str, parts: list[str]) -> None:
    assert stderr.startswith("rlhf-cli: error: ")
    assert stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr


def check_last_line(stderr: str, parts: list[str]) -> None:
    """Of a run that began: before its one line it said what it is and what it loads."""
    *before, line = stderr.splitlines(keepends=True)
    assert not before or any(each.startswith("loading PyTorch") for each in before), stderr
    assert not any("error: " in each for each in before), stderr
    check_line(line, parts)


@pytest.mark.parametrize("name", EARLY)
def test_a_bad_input_is_one_line_and_changes_nothing(name: str, here: Cli, place: Path) -> None:
    change, words, parts = EARLY[name]
    change(place)
    before = contents(place)
    done = here(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr, parts)
    assert contents(place) == before


@pytest.mark.parametrize("name", fast(list(EARLY)[::60], list(EARLY)[::20]))
def test_a_bad_input_is_told_of_in_time(name: str, cli: Cli, place: Path) -> None:
    change, words, parts = EARLY[name]
    change(place)
    began = cpu_seconds()
    done = cli(*words.split())
    assert cpu_seconds() - began < SECONDS
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr, parts)


@pytest.mark.parametrize(
    "name",
    fast(lambda name: "never ends" not in name, LATE),
)
def test_what_only_loading_shows_changes_nothing_either(name: str, here: Cli, place: Path) -> None:
    change, words, parts = LATE[name]
    change(place)
    before = contents(place)
    done = here(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    check_last_line(done.stderr, parts)
    assert contents(place) == before


# Others load no more than these, in this process or another one.
@pytest.mark.parametrize("name", ["recorded weights with a bit flipped", "narrower weights"])
@pytest.mark.slow
def test_what_loading_shows_is_shown_in_time(name: str, cli: Cli, place: Path) -> None:
    change, words, parts = LATE[name]
    change(place)
    began = cpu_seconds()
    done = cli(*words.split())
    assert cpu_seconds() - began < SECONDS_WITH_WEIGHTS
    assert (done.returncode, done.stdout) == (2, "")
    check_last_line(done.stderr, parts)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", ["rows.jsonl", f"{POLICY}/config.json", f"{POLICY}/stage.json"])
def test_a_file_without_permission(name: str, cli: Cli, place: Path) -> None:
    (place / name).chmod(0)
    done = cli(*PPO.split())
    assert done.returncode == 2
    check_line(done.stderr, [f"{name}: cannot be read: Permission denied"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_without_permission(cli: Cli, place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    done = cli(*f"{SFT} out=locked/x".split())
    assert done.returncode == 2
    check_line(done.stderr, ["out=locked/x: no permission to write in locked"])


def test_check_finds_bad_rows(cli: Cli, place: Path) -> None:
    rows(GIVEN, "{")(place)
    done = cli(*f"{OWN_SFT} --check".split())
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr, ["own.jsonl:2: not JSON"])


def test_check_counts_rows(cli: Cli, place: Path) -> None:
    rows(PAIR, {**PAIR, "chosen": ""})(place)
    done = cli(*f"ppo {OWN} data.bad_rows=drop data.eval_rows=1 --check".split())
    assert done.returncode == 2  # one row cannot be split
    rows(PAIR, {**PAIR, "chosen": ""}, {**PAIR, "prompt": "Other"})(place)
    done = cli(*f"ppo {OWN} data.bad_rows=drop data.eval_rows=1 --check".split())
    assert done.returncode == 0, done.stderr
    assert "own.jsonl: 2 preference rows, 1 dropped: column 'chosen' is empty" in done.stderr


# --------------------------------------------------------------------------- what an out is told


def test_a_finished_out_is_printed_and_left_alone(cli: Cli, place: Path) -> None:
    before = contents(place)
    done = cli(*SFT.split())
    assert (done.returncode, done.stdout) == (0, f"{POLICY}\n")
    assert done.stderr == f"{POLICY}: already finished; nothing to do\n"
    assert contents(place) == before


@pytest.mark.slow
def test_a_sweep_writes_a_folder_for_each_job(cli: Cli, place: Path) -> None:
    done = cli(*f"generate -m {ROWS} policy={POLICY} out=out algo.prompts=2 seed=1,2".split())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/seed=1\nout/seed=2\n"
    for job in ("out/seed=1", "out/seed=2"):
        assert json.loads((place / job / "stage.json").read_text())["complete"]
        assert len((place / job / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_overwrite_starts_afresh_in_a_folder_of_ours(cli: Cli, place: Path) -> None:
    write("runs/demo/reward/notes.txt", "Left by the run before.")(place)
    done = cli(*f"{REWARD} seed=3 overwrite=true".split())
    assert (done.returncode, done.stdout) == (0, "runs/demo/reward\n"), done.stderr
    assert not (place / "runs/demo/reward/notes.txt").exists()
    assert "seed: 3" in (place / "runs/demo/reward/config.yaml").read_text()
