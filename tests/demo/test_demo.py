"""The shipped rows: made by their script, labelled by the gold score, and held out for real."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.kinds import Preference, Prompt, Ranking, cut_steps
from rlhf_cli.data.rows import DEMO_FOLDER, read_split
from rlhf_cli.demo import make_rows
from rlhf_cli.demo.gold import gold_score
from rlhf_cli.rewards.answers import exact_answer
from tests.toys import composed

LEGS = "Mia asks: How many legs does a spider have?"
KINDS = tuple(make_rows.SIZES)


def rows(kind: str, side: str) -> list[dict[str, Any]]:
    file = DEMO_FOLDER / f"{kind}.{side}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_script_makes_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    make_rows.main(tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    shipped = {file.name: file.read_bytes() for file in DEMO_FOLDER.glob("*.jsonl")}
    assert made.keys() == shipped.keys()
    assert [name for name in made if made[name] != shipped[name]] == []


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        (LEGS, "Hello Mia! A spider has 8 legs. Thank you for asking!", 4),
        (LEGS, "Every spider has 8 legs.", 2),
        (LEGS, "A spider has 6 legs.", -1),
        (LEGS, "A crab has 10 legs.", -1),  # true, and not what was asked
        (LEGS, "A spider has 8 wheels.", -1),
        (LEGS, "Hi Tom! A spider has 8 legs.", 1),  # another child: -1 + 2
        (LEGS, "I do not know.", 0),
        (LEGS, "A spider has 8 legs. A spider has 8 legs.", 1),  # 2 - 1: a repeat earns nothing
        (LEGS, "Have a nice day! Thank you for asking!", 0),  # 1 - 1: one closing is enough
        (LEGS, "A spider has 8 legs. Now go away!", 0),
        (LEGS, "Now go away! Stop wasting my time!", -4),
        (LEGS, "Now go away! Now go away!", -3),
        (LEGS, "Bananas are yellow.", -1),
        (LEGS, "a spider has 8 legs", -1),  # no sentence of the guide's
        (LEGS, "", 0),
        ("Tom asks: What is the number of sides of an octagon?", "An octagon has 8 sides.", 2),
        ("Tom asks: Tell me how many wheels there are on a kite.", "A kite has 0 wheels.", 2),
    ],
)
def test_gold_scores_by_example(prompt: str, response: str, score: float) -> None:
    assert gold_score(prompt, response) == score


def test_gold_knows_its_own_questions_only() -> None:
    with pytest.raises(ValueError, match="not a question"):
        gold_score("What is two plus two?", "Four.")


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_prompt_was_trained_on(kind: str) -> None:
    """Not even on rows of another kind: the question of a held-out row is new to every stage."""
    name = "text" if kind == "text" else "prompt"
    unseen = {row[name] for row in rows(kind, "eval")}
    same_name = [other for other in KINDS if (other == "text") == (kind == "text")]
    for other in same_name:
        assert not unseen & {row[name] for row in rows(other, "train")}, other


@pytest.mark.parametrize("side", ["train", "eval"])
def test_labels_are_as_noisy_as_they_say(side: str) -> None:
    """Bradley-Terry on the gold score: the share of right labels is what the margins promise."""
    pairs = [
        gold_score(row["prompt"], row["chosen"]) - gold_score(row["prompt"], row["rejected"])
        for row in rows("preferences", side)
    ]
    decided = [margin for margin in pairs if margin]
    promised = [1 / (1 + math.exp(-abs(margin))) for margin in decided]
    error = math.sqrt(sum(p * (1 - p) for p in promised))
    assert abs(sum(margin > 0 for margin in decided) - sum(promised)) < 4 * error
    assert 0 < sum(margin < 0 for margin in decided) < len(decided) / 3


def test_ranks_follow_the_gold_score_with_noise() -> None:
    """First places by Plackett-Luce: exp(s) / sum exp(s)."""
    gap, variance = 0.0, 0.0
    for row in rows("rankings", "train"):
        assert sorted(row["ranks"]) == [1, 2, 3, 4]
        assert len(set(row["responses"])) == 4
        scores = [gold_score(row["prompt"], text) for text in row["responses"]]
        top = max(scores)
        if scores.count(top) == 1:
            share = 1 / sum(math.exp(score - top) for score in scores)
            won = row["ranks"][scores.index(top)] == 1
            gap, variance = gap + won - share, variance + share * (1 - share)
    assert abs(gap) < 4 * math.sqrt(variance)


@pytest.mark.parametrize("side", ["train", "eval"])
def test_feedback_follows_the_gold_score_with_noise(side: str) -> None:
    """Thumbs by their logistic; marks around the score; up is the rarer thumb, and common."""
    found = rows("feedback", side)
    gold = [gold_score(row["prompt"], row["completion"]) for row in found]
    up = [row["label"] for row in found]
    promised = [1 / (1 + math.exp(make_rows.GOOD_ENOUGH - score)) for score in gold]
    error = math.sqrt(sum(p * (1 - p) for p in promised))
    assert abs(sum(up) - sum(promised)) < 4 * error
    assert 0.2 < sum(up) / len(up) < 0.4
    off = [row["score"] - score for row, score in zip(found, gold, strict=True)]
    spread = math.sqrt(make_rows.MARK_NOISE**2 + 1 / 12)  # of the noise and of rounding
    assert abs(sum(off)) < 4 * spread * math.sqrt(len(off))
    assert 0.8 < math.sqrt(sum(d * d for d in off) / len(off)) / spread < 1.2
    assert all(isinstance(row["score"], int) for row in found)


@pytest.mark.parametrize("side", ["train", "eval"])
def test_steps_are_the_sentences_and_their_part_of_the_gold_score(side: str) -> None:
    data = composed("dpo").data
    labels = []
    for row in rows("steps", side):
        reply = data.step_join.join(row["steps"])
        assert [step.strip() for step in cut_steps(reply, data.step_end)] == row["steps"]
        for i, label in enumerate(row["labels"]):
            before, after = (
                gold_score(row["prompt"], " ".join(row["steps"][:count])) for count in (i, i + 1)
            )
            assert label == (after > before)
        labels += row["labels"]
    assert 0.5 < sum(labels) / len(labels) < 0.8


def test_no_file_is_large() -> None:
    assert max(file.stat().st_size for file in DEMO_FOLDER.glob("*.jsonl")) < 900_000


@pytest.mark.parametrize("kind", [Preference, Ranking])
def test_no_shipped_pair_stops_a_run(kind: type) -> None:
    """A noisy judge contradicts itself at times; no text is judged against itself."""
    notes = read_split(composed("dpo").data, kind).notes
    assert not any("against itself" in note for note in notes)
    assert sum("the better side has more characters in" in note for note in notes) == 2


@pytest.mark.parametrize("side", ["train", "eval"])
def test_answers_are_checkable_and_demonstrations_mixed(side: str) -> None:
    for row in rows("prompts", side):
        answer = row.pop("answer")
        right = f"It is {answer}."
        assert exact_answer(Prompt(row["prompt"], {"answer": answer}), right) == 1
    scores = [gold_score(row["prompt"], row["completion"]) for row in rows("demonstrations", side)]
    assert max(scores) == 4 and min(scores) <= -3
    assert 0.3 < sum(score > 0 for score in scores) / len(scores) < 0.8
