"""Conversions of feedback by hand-made rows and counts, and steps that give their text again."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.conversions import CONVERSIONS, convert, note_of, route
from rlhf_cli.data.kinds import (
    Feedback,
    Preference,
    Prompt,
    Ranking,
    Row,
    Stepwise,
    cut_steps,
    pairs_of,
)
from tests.toys import data_of

SENTENCE = "(?<=[.!?]) "


def converted(name: str, *rows: Row, **data: Any) -> tuple[list[Any], str]:
    """Rows after one conversion, and its note."""
    made, counts = convert(list(rows), name, data_of(**data))
    return made, note_of(name, counts)


def test_pairs_of_a_ranking() -> None:
    row = Ranking("p", ["c", "a", "b", "b2"], [3, 1, 2, 2])
    pairs = [(pair.chosen, pair.rejected) for pair in pairs_of(row)]
    assert sorted(pairs) == [("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c")]


def test_ranking_to_preference() -> None:
    rows = [
        Ranking("p", ["a", "b", "c"], [1, 2, 2], "f:1", "web"),
        Ranking("q", ["a", "b"], [5, 5], "f:2"),
    ]
    made, note = converted("ranking_to_preference", *rows)
    assert made == [
        Preference("p", "a", "b", "f:1", None, "web"),
        Preference("p", "a", "c", "f:1", None, "web"),
    ]
    assert note == "ranking_to_preference: 2 preference rows from 2 ranking rows, 2 ties dropped"


def test_other_kinds_are_left_alone() -> None:
    prompt, pair = Prompt("x"), Preference("p", "a", "b")
    made, note = converted("ranking_to_preference", prompt, Ranking("p", ["a", "b"], [1, 2]), pair)
    assert made == [prompt, pair, pair]
    assert note == "ranking_to_preference: 1 preference rows from 1 ranking rows"


def test_preference_to_ranking_and_back() -> None:
    pair = Preference("p", "a", "b", "f:1", None, "web")
    made, note = converted("preference_to_ranking", pair)
    assert made == [Ranking("p", ["a", "b"], [1, 2], "f:1", "web")]
    assert note == "preference_to_ranking: 1 ranking rows from 1 preference rows"
    assert converted("ranking_to_preference", *made)[0] == [pair]


def test_preference_to_feedback() -> None:
    made, note = converted("preference_to_feedback", Preference("p", "a", "b", "f:1", 2.0, "web"))
    assert made == [
        Feedback("p", "a", True, None, "f:1", "web"),
        Feedback("p", "b", False, None, "f:1", "web"),
    ]
    assert note == "preference_to_feedback: 2 feedback rows from 1 preference rows"


def test_feedback_to_ranking_by_score_or_label() -> None:
    rows = [
        Feedback("scored", "a", True, 1.0, "f:1", "x"),  # the score is finer, and goes first
        Feedback("thumbs", "a", False, None, "f:2", "x"),
        Feedback("scored", "b", False, 3.0, "f:3", "x"),
        Feedback("thumbs", "b", True, 9.0, "f:4", "y"),  # not all have a score
        Feedback("scored", "c", None, 1.0, "f:5", "x"),
        Feedback("thumbs", "c", None, 7.0, "f:6", "y"),
        Feedback("thumbs", "d", False, None, "f:7", "y"),
    ]
    made, note = converted("feedback_to_ranking", *rows)
    assert made == [
        Ranking("scored", ["a", "b", "c"], [2, 1, 2], "f:1", "x"),
        Ranking("thumbs", ["a", "b", "d"], [2, 1, 2], "f:2", ""),
    ]
    assert note == (
        "feedback_to_ranking: 2 ranking rows from 7 feedback rows, "
        "1 answers without a label dropped"
    )


def test_feedback_to_ranking_drops_what_ranks_nothing() -> None:
    rows = [
        Feedback("alone", "a", True),
        Feedback("tied", "a", True),
        Feedback("tied", "b", True),
        Feedback("same", "a", None, 1.0),
        Feedback("same", "a", None, 1.0),
        Feedback("good", "a", True),
        Feedback("good", "a", True),
        Feedback("good", "b", False),
        Feedback("torn", "a", True),
        Feedback("torn", "a", False),  # not agreed: it stands at both places
    ]
    made, note = converted("feedback_to_ranking", *rows)
    assert made == [
        Ranking("good", ["a", "b"], [1, 2]),
        Ranking("torn", ["a", "a"], [1, 2]),
    ]
    assert note == (
        "feedback_to_ranking: 2 ranking rows from 10 feedback rows, "
        "2 repeated answers counted once, 2 prompts with fewer than 2 answers dropped, "
        "1 prompts with all answers tied dropped"
    )


def test_prompts_of_messages_are_grouped_too() -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = [Feedback(list(turns), "a", True), Feedback(list(turns), "b", False)]
    assert converted("feedback_to_ranking", *rows)[0] == [Ranking(turns, ["a", "b"], [1, 2])]


def test_feedback_to_stepwise() -> None:
    rows = [
        Feedback("p", "one\n\ntwo\nA: 3", True, None, "f:1"),
        Feedback("q", "one\n", False, None, "f:2"),
        Feedback("r", "one", None, 4.0),
    ]
    made, note = converted("feedback_to_stepwise", *rows)
    assert made == [
        Stepwise("p", ["one\n", "two", "A: 3"], [1, 1, 1], "f:1"),
        Stepwise("q", ["one\n"], [0], "f:2"),
    ]
    assert ["\n".join(row.steps) for row in made] == [row.completion for row in rows[:2]]
    assert (
        note
        == "feedback_to_stepwise: 2 stepwise rows from 3 feedback rows, 1 without a label dropped"
    )


def test_steps_that_do_not_join_again() -> None:
    row = Feedback("p", "One. Two.", True, None, "f.jsonl:3")
    with pytest.raises(UserError, match=r"f\.jsonl:3: the steps that data\.step_end=") as caught:
        converted("feedback_to_stepwise", row, step_end=SENTENCE)
    assert "data.step_join='' joins any steps" in str(caught.value)
    (made,), _ = converted("feedback_to_stepwise", row, step_end=SENTENCE, step_join="")
    assert made.steps == ["One. ", "Two."]
    (made,), _ = converted("feedback_to_stepwise", row, step_end=SENTENCE, step_join=" ")
    assert made.steps == ["One.", "Two."]


@pytest.mark.parametrize(
    ("text", "step_end", "steps"),
    [
        ("", "\n", []),
        ("a", "\n", ["a"]),
        ("a\nb", "\n", ["a\n", "b"]),
        ("a\nb\n", "\n", ["a\n", "b\n"]),
        ("a\n\n\nb", "\n", ["a\n\n\n", "b"]),  # a blank is no step
        ("\n\na\nb", "\n", ["\n\na\n", "b"]),
        (" \n", "\n", [" \n"]),
        ("a\n\nb\nc", "\n\n", ["a\n\n", "b\nc"]),
        ("Hi! A crab has 10 legs. Bye!", SENTENCE, ["Hi! ", "A crab has 10 legs. ", "Bye!"]),
        ("ab", "", ["a", "b"]),
        ("a.b", r"(?<=\.)", ["a.", "b"]),
    ],
)
def test_steps_by_example(text: str, step_end: str, steps: list[str]) -> None:
    assert cut_steps(text, step_end) == steps


@given(
    st.text(alphabet="ab .!?\n\t"), st.sampled_from(["\n", "\n\n", SENTENCE, r"\s+", "$", "", "a"])
)
def test_steps_are_the_text_again(text: str, step_end: str) -> None:
    steps = cut_steps(text, step_end)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or len(steps) == 1
    assert cut_steps("".join(steps), step_end) == steps


@given(st.text(alphabet="ab \n", min_size=1).filter(str.strip))
def test_steps_of_feedback_are_cut_alike_again(text: str) -> None:
    """What the tokens of a row's steps rest on."""
    (row,), _ = converted("feedback_to_stepwise", Feedback("p", text, True))
    assert "\n".join(row.steps) == text
    assert len(cut_steps(text, "\n")) == len(row.steps) == len(row.labels)


@pytest.mark.parametrize(
    ("start", "end", "names"),
    [
        (Ranking, Preference, ["ranking_to_preference"]),
        (Preference, Stepwise, ["preference_to_feedback", "feedback_to_stepwise"]),
        (Feedback, Preference, ["feedback_to_ranking", "ranking_to_preference"]),
        (Ranking, Ranking, []),
        (Stepwise, Feedback, None),
        (Prompt, Preference, None),
    ],
)
def test_routes(start: type, end: type, names: list[str] | None) -> None:
    assert route(start, end) == names


def test_the_config_knows_every_conversion() -> None:
    from dataclasses import fields

    from rlhf_cli.config.schema.data import Data

    (key,) = (field for field in fields(Data) if field.name == "convert")
    assert sorted(key.metadata["choices"]) == sorted(CONVERSIONS)
