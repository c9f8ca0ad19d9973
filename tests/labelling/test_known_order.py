"""Policies whose order is known come out in that order, by a rule that sees answers alone."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.labelling.test_label import label
from tests.tiny import DATA

WORDS = [
    *(word for word in DATA if "eval" not in word),
    *("policy=runs/demo/sft", "source=reward", "reward=numeric_answer:0", "algo.prompts=null"),
    *("algo.repeat=0", "algo.overlap=0"),
]
SOLVED = {
    "6b_finetuning": 0.219,
    "175b_finetuning": 0.344,
    "6b_verification": 0.400,
    "175b_verification": 0.569,
}
"""How many of 700 problems of GSM8K each model solved (Cobbe et al. 2021, 2110.14168)."""


def found(name: str) -> Path:
    """A file of shared/data beside the checkout, wherever one lies; the test is skipped else."""
    places = [folder / "shared/data" / name for folder in Path(__file__).parents]
    file = next((each for each in places if each.is_file()), None)
    if file is None:
        pytest.skip(f"there is no shared/data/{name} beside this checkout")
    return file


def rated(out: Path, file: Path, rows: list[dict[str, Any]], *more: str) -> dict[str, Any]:
    """The report of labels by the rule, of responses with the answer that is right."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = label(out, *WORDS, f"samples={file}", *more)
    report: dict[str, Any] = json.loads((made / "report.json").read_text())
    return report


def test_four_policies_come_out_in_the_order_in_which_they_are_right(
    inside: None, tmp_path: Path
) -> None:
    draw = random.Random(0)
    rows = [
        {"prompt": f"{i}+{i}=", "policy": policy, "answer": str(2 * i)}
        | {"response": f"{policy[:2]} {2 * i + (draw.random() > share)}"}
        for i in range(300)
        for policy, share in SOLVED.items()
    ]
    report = rated(tmp_path / "out", tmp_path / "s.jsonl", rows)
    ratings = report["ratings"]
    assert sorted(ratings, key=lambda name: ratings[name]["rating"]) == list(SOLVED)
    best, worst = ratings["175b_verification"], ratings["6b_finetuning"]
    assert set(best["above"]) == SOLVED.keys() - {"175b_verification"} and worst["above"] == []


@pytest.mark.slow
def test_models_that_solved_gsm8k_come_out_in_their_order(inside: None, tmp_path: Path) -> None:
    lines = found("gsm8k_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    shares = {name: sum(each[name]["is_correct"] for each in problems) for name in SOLVED}
    assert {name: round(count / 700, 3) for name, count in shares.items()} == SOLVED
    rows = [
        {"prompt": each["question"], "response": each[name]["solution"], "policy": name}
        | {"answer": each["ground_truth"].rpartition("A:")[2].strip()}
        for each in problems
        for name in SOLVED
    ]
    report = rated(tmp_path / "out", tmp_path / "s.jsonl", rows)
    ratings = report["ratings"]
    assert sorted(ratings, key=lambda name: ratings[name]["rating"]) == list(SOLVED)
    order = list(SOLVED)
    for better, worse in zip(order[1:], order, strict=False):
        assert worse in ratings[better]["above"], (better, worse)
    tasks = (tmp_path / "out/tasks.jsonl").read_text().splitlines()
    right = dict.fromkeys(SOLVED, 0.0)
    for origin in (each for line in tasks for each in json.loads(line)["origins"]):
        for name in origin.get("writers", [origin["policy"]]):
            right[name] += origin["reward"]
    assert {name: right[name] / 700 for name in SOLVED} == pytest.approx(SOLVED, abs=1e-3)
