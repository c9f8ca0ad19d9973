"""Rules by example."""

from pathlib import Path

import pytest

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards.rules import RULE_NAMES, check_columns, is_rule, read_lexicon, rule_of


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
        ("repetition:1", "a b c", 0.0),
        ("repetition:1", "a A a a", 0.75),  # one of four is new
        ("repetition:2", "a b a b a", 0.5),  # ab ba ab ba
        ("repetition:3", "a b", 0.0),  # too short for any
        ("repetition:3", "", 0.0),
        ("json", ' {"a": [1, 2.5e3, null]}\n', 1.0),
        ("json", "3", 1.0),
        ("json", "[1, 2", 0.0),
        ("json", "{'a': 1}", 0.0),
        ("json", 'Here: {"a": 1}', 0.0),
        ("json", '```json\n{"a": 1}\n```', 0.0),
        ("json", '{"a": NaN}', 0.0),  # Python's, not JSON's
        ("json", "1" * 5000, 1.0),
        ("json", "[" * 100_000, 0.0),
        ("json", "", 0.0),
        ("json:a|b", '{"a": 1, "b": 2, "c": 3}', 1.0),
        ("json:a|b", '{"a": {"b": 2}}', 0.0),
        ("json:a", '["a"]', 0.0),
        ("tags:think|answer", "<think>a\nb</think>\n<answer>c</answer>\n", 1.0),
        ("tags:think|answer", "<think></think><answer></answer>", 1.0),
        ("tags:think|answer", "<answer>c</answer><think>a</think>", 0.0),
        ("tags:think|answer", "<think>a</think>", 0.0),
        ("tags:think|answer", "<think>a<answer>c</answer></think>", 0.0),
        ("tags:think|answer", "<think>a</think> so <answer>c</answer>", 0.0),
        ("tags:think|answer", "<think>a</think><answer>c</answer> bye", 0.0),
        ("tags:think|answer", "<think><think>a</think><answer>c</answer>", 0.0),
        ("tags:think|answer", "<think>a</think><answer>c</answer><answer>d</answer>", 0.0),
        ("tags:a", "<a>x</a>", 1.0),
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
        ("math_answer:7", "takes no argument, got '7'"),
        ("repetition:0", "repetition needs the length of a run"),
        ("repetition:", "repetition needs the length of a run"),
        ("json:|", "json takes keys"),
        ("tags:", "tags needs names"),
        ("tags:a|a", "tags needs names"),
        ("tags:<a>", "tags needs names"),
        ("numeric_answer:", "needs a tolerance"),
        ("numeric_answer:-1", "needs a tolerance"),
        ("numeric_answer:nan", "needs a tolerance"),
        ("lexicon:", "no such text file"),
        ("lexicon:nowhere.txt", "lexicon:nowhere.txt: no such text file"),
    ],
)
def test_a_bad_argument_is_named(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rule_of(spec)


@pytest.mark.parametrize("spec", ["runs/demo/reward", "owner/name", "exact_answers", "C:/x"])
def test_what_is_no_rule_is_a_model(spec: str) -> None:
    assert rule_of(spec) is None and not is_rule(spec)


def test_every_rule_says_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("good\n")
    arguments = {"tags": "a", "lexicon": str(tmp_path / "words")}
    for name in RULE_NAMES:
        plain = name.removesuffix(":...")
        spec = name.replace("...", arguments.get(plain, "1"))
        rule = rule_of(spec)
        assert rule is not None and is_rule(spec)
        assert rule.spec == spec
        assert len(rule.meaning) > 20 and "\n" not in rule.meaning, name


def test_rows_must_have_the_column_that_a_rule_reads() -> None:
    rule = rule_of("exact_answer")
    assert rule is not None and rule.column == "answer"
    check_columns(rule, [Prompt("q", {"answer": "1"})])
    with pytest.raises(UserError, match="f:2: .* needs a column 'answer'; found prompt, solution"):
        check_columns(rule, [Prompt("q", {"answer": "1"}), Prompt("q", {"solution": 1}, "f:2")])


def test_a_tolerance_needs_numbers_to_compare_with() -> None:
    rule = rule_of("numeric_answer:0.1")
    assert rule is not None
    check_columns(rule, [Prompt("q", {"answer": "$1,000"}), Prompt("q", {"answer": 7})])
    with pytest.raises(UserError, match="f:1: .* needs a number in column 'answer', got 'Paris'"):
        check_columns(rule, [Prompt("q", {"answer": "Paris"}, "f:1")])
    assert rule.score(Prompt("q", {"answer": 100}), "#### 110") == 1
    assert rule.score(Prompt("q", {"answer": 100}), "#### 111") == 0


# --------------------------------------------------------------------------- lexicons


def test_a_lexicon_weighs_words(tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    file.write_text("# moods\nGood\t2\n\nbad\t-1.5\nfine\ndon't\t-1\nwell-known\t0.5\n")
    rule = rule_of(f"lexicon:{file}")
    assert rule is not None

    def of(text: str) -> float | None:
        return rule.score(Prompt("q"), text)

    assert of("good, GOOD and bad!") == pytest.approx((2 + 2 - 1.5) / 4)  # `and` weighs 0
    assert of("a fine day") == pytest.approx(1 / 3)
    assert of("don't") == -1 and of("Don\u2019t") == -1  # either apostrophe
    assert of("a well-known goodness") == pytest.approx(0.5 / 3)
    assert of("") == 0 and of("...") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("good\nbad\tvery\n", "line 2: 'very' is no weight"),
        ("good\tinf\n", "line 1: 'inf' is no weight"),
        ("so so\t1\n", "line 1: 'so so' is not one word"),
        ("good\n\nGOOD\t2\n", "line 3: 'good' is there already"),
        ("# nothing\n", "the file holds no words"),
    ],
)
def test_a_lexicon_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_lexicon(file)


@pytest.mark.slow
def test_a_pattern_that_never_ends_ends_the_run() -> None:
    rule = rule_of("regex:(a+)+$")
    assert rule is not None
    assert rule.score(Prompt("p"), "aaa") == 1.0
    with pytest.raises(RunError, match=r"on 'aaaa.* does not end within 10 s of processor time"):
        rule.score(Prompt("p"), "a" * 60 + "!")
