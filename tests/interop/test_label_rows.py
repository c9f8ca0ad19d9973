"""Rows of label as they are: datasets loads them, and TRL's trainers learn from them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.interop.made import theirs
from tests.labelling.test_label import label

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("inside")]
FILES = {"rank": "rankings.jsonl", "pair": "preferences.jsonl", "thumbs": "feedback.jsonl"}
COLUMNS = {"task", "annotator", "labelled_by", "instructions", "policies"}


def labelled(folder: Path, protocol: str, dialogues: bool) -> Path:
    """A label folder that a reward has sealed."""
    rows = []
    for i in range(12):
        prompt: Any = f"Greet {'abc'[i % 3]}{i}:"
        if dialogues:
            prompt = [{"role": "user", "content": prompt}]
        for j in range(4):
            said = {"response": f" Hi {j}{i}!", "policy": "sft", "reward": j - 1.5}
            rows.append({"prompt": prompt, **said})
    (folder / "s.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [f"samples={folder / 's.jsonl'}", "policy=null", "source=reward"]
    return label(folder / protocol, *words, f"algo.protocol={protocol}", "algo.repeat=0")


def loaded(file: Path) -> Any:
    """The rows as anybody loads them."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(file), split="train")


@pytest.mark.parametrize("protocol", FILES)
@pytest.mark.parametrize("dialogues", [False, True])
def test_datasets_loads_them(place: Path, protocol: str, dialogues: bool, tmp_path: Path) -> None:
    rows = loaded(labelled(tmp_path, protocol, dialogues) / FILES[protocol])
    lines = (tmp_path / protocol / FILES[protocol]).read_text().splitlines()
    assert rows.num_rows == len(lines) > 0 and set(rows.column_names) >= COLUMNS
    first = json.loads(lines[0])
    assert {name: rows[0][name] for name in first} == first


@pytest.mark.parametrize(
    ("protocol", "file", "stage"),
    [
        *(("rank", "preferences.jsonl", stage) for stage in ("dpo", "reward")),
        *(("pair", "preferences.jsonl", stage) for stage in ("dpo", "reward")),
        ("thumbs", "feedback.jsonl", "kto"),
    ],
)
@pytest.mark.parametrize("dialogues", [False, True])
def test_its_trainers_learn_from_them(
    place: Path, protocol: str, file: str, stage: str, dialogues: bool, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    from transformers import AutoTokenizer

    if dialogues and AutoTokenizer.from_pretrained("base").chat_template is None:
        pytest.skip("the base has no chat template")
    rows = loaded(labelled(tmp_path, protocol, dialogues) / file)
    loss = theirs(stage, "base", tmp_path / "theirs", rows=rows)
    assert math.isfinite(loss) and loss < 10
