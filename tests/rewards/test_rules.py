"""Rules by example."""

import pytest

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards.answers import exact_answer, final_answer, number_of
from rlhf_cli.rewards.rules import RULE_NAMES, check_columns, rule_of


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("3 + 4 = 7\n#### 7", "7", 1),
        ("#### 1,234", "1234", 1),
        ("#### 1234", "1,234", 1),
        ("#### $5.50", "5.5", 1),
        ("#### -3", "-3", 1),
        ("#### 7.", "7", 1),
        ("#### 12 then #### 13", "13", 1),  # the last one counts
        ("#### 7\nand 8 more", "7", 1),
        ("#### \n 7", "7", 1),
        ("####", "7", 0),
        ("7 is the answer #### 8", "7", 0),
        ("I think it is 7", "7", 1),  # no ####: the last number
        ("7 or rather 9.", "9", 1),
        ("it costs 1,000.50 coins", "1000.5", 1),
        ("70", "7", 0),
        ("-7", "7", 0),
        ("no idea", "7", 0),
        ("", "7", 0),
        ("#### Paris ", "paris", 1),
        ("#### ", "", 0),  # nothing is no answer
    ],
)
def test_exact_answer(response: str, answer: str, score: float) -> None:
    assert exact_answer(Prompt("q", {"answer": answer}), response) == score


def test_a_number_as_the_answer_column() -> None:
    assert exact_answer(Prompt("q", {"answer": 7}), "#### 7.0") == 1


def test_pieces_of_an_answer() -> None:
    assert final_answer("a 1 b 2 c") == "2"
    assert number_of("$1,234.5.") == 1234.5
    assert number_of("two") is None and number_of("") is None and number_of("1e5x") is None


def score(spec: str, response: str, prompt: str = "q") -> float:
    rule = rule_of(spec)
    assert rule is not None
    found = rule.score(Prompt(prompt), response)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("spec", "response", "expected"),
    [
        ("keywords:happy|friend", "My Friend is HAPPY!", 1.0),
        ("keywords:happy|friend", "a friendly face", 0.0),  # whole words
        ("keywords: happy | friend ", "so happy", 0.5),
        ("regex:^yes", "yes, sure", 1.0),
        ("regex:^yes", "oh yes", 0.0),
        ("regex:a:b", "xa:by", 1.0),  # the argument may hold a colon
        ("length:4", "one two three four", 1.0),
        ("length:4", "one two three", 0.75),
        ("length:4", "one two three four five", 0.75),
        ("length:4", "", 0.0),
        ("length:2", "a b c d e f g h", 0.0),
    ],
)
def test_rules_with_an_argument(spec: str, response: str, expected: float) -> None:
    assert score(spec, response) == pytest.approx(expected)


def test_demo_gold_scores_the_demos_prompts_only() -> None:
    asked = "Mia asks: How many legs does a spider have?"
    assert score("demo_gold", "A spider has 8 legs.", asked) == 2
    rule = rule_of("demo_gold")
    assert rule is not None
    with pytest.raises(UserError, match="f:3: demo_gold: not a question"):
        rule.score(Prompt("hello", source="f:3"), "A spider has 8 legs.")
    with pytest.raises(UserError, match="demo's own prompts only"):
        rule.score(Prompt([{"role": "user", "content": asked}]), "")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("keywords:", "keywords needs words"),
        ("keywords: | ", "keywords needs words"),
        ("regex:(", "not a regular expression"),
        ("length:few", "length needs a number"),
        ("length:0", "length needs a number"),
        ("exact_answer:7", "takes no argument, got '7'"),
    ],
)
def test_a_bad_argument_is_named(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rule_of(spec)


@pytest.mark.parametrize("spec", ["runs/demo/reward", "owner/name", "exact_answers", "C:/x"])
def test_what_is_no_rule_is_a_model(spec: str) -> None:
    assert rule_of(spec) is None


def test_every_rule_says_what_it_means() -> None:
    for name in RULE_NAMES:
        rule = rule_of(name.replace("...", "1"))
        assert rule is not None
        assert rule.spec == name.replace("...", "1")


def test_rows_must_have_the_column_that_a_rule_reads() -> None:
    rule = rule_of("exact_answer")
    assert rule is not None and rule.column == "answer"
    check_columns(rule, [Prompt("q", {"answer": "1"})])
    with pytest.raises(UserError, match="f:2: .* needs a column 'answer'; found prompt, solution"):
        check_columns(rule, [Prompt("q", {"answer": "1"}), Prompt("q", {"solution": 1}, "f:2")])
