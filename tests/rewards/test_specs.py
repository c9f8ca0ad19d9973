"""What `reward=` may say, and what is known of it without torch."""

import json
from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.rewards.specs import (
    Term,
    check_rows_of,
    function_of,
    meaning_of,
    models_of,
    signature_of,
    terms_of,
    value_of,
)
from rlhf_cli.runs.model_checks import check_models
from rlhf_cli.runs.plan_lines import reward_lines
from rlhf_cli.runs.provenance import parents_of


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("exact_answer", [(1, "exact_answer")]),
        ("runs/demo/reward + 0.2*length:20", [(1, "runs/demo/reward"), (0.2, "length:20")]),
        ("-0.5*repetition:3", [(-0.5, "repetition:3")]),
        ("1e-1 * length:3  +  2*demo_gold", [(0.1, "length:3"), (2, "demo_gold")]),
        ("regex:a*b", [(1, "regex:a*b")]),  # a star after a colon is the pattern's
        ("2*regex:a*b", [(2, "regex:a*b")]),
        ("./a*b", [(1, "./a*b")]),  # and after a slash the path's
        ("regex:a+b", [(1, "regex:a+b")]),
        (r"regex:a\s\+\sb + json", [(1, r"regex:a\s\+\sb"), (1, "json")]),
        ("0*demo_gold + json", [(0, "demo_gold"), (1, "json")]),  # logged, not learned from
        ("dir/checks.py:polite", [(1, "dir/checks.py:polite")]),
    ],
)
def test_terms(spec: str, terms: list[tuple[float, str]]) -> None:
    assert terms_of(spec) == [Term(weight, name) for weight, name in terms]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "a term is empty"),
        ("json + ", "a term is empty"),
        ("json +", "a term is empty"),
        ("+ json", "a term is empty"),
        ("json +  + demo_gold", "a term is empty"),
        ("2*", "a term is empty"),
        ("nan*json", "'nan' is no weight; a term is WEIGHT*TERM"),
        ("inf*json", "'inf' is no weight"),
        ("two*json", "'two' is no weight"),
        ("*json", "'' is no weight"),
        ("json + 2*json", "the term json is given twice"),
        ("0*json", "every weight is 0"),
    ],
)
def test_what_is_no_reward(spec: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        terms_of(spec)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_sum_passes_the_command_line() -> None:
    spec = "exact_answer + -0.2*repetition:3 + 0.5*dir/checks.py:polite"
    assert compose("grpo", [f"reward={spec}"]).reward == spec


def test_folders_among_the_terms_are_parents(tmp_path: Path) -> None:
    for name in ("policy", "one", "two"):
        (tmp_path / name).mkdir()
    one, two = tmp_path / "one", tmp_path / "two"
    spec = f"length:3 + {one} + 2*{two} + owner/name"
    assert models_of(spec) == [str(one), str(two), "owner/name"]
    cfg = compose("ppo", [f"policy={tmp_path / 'policy'}", f"reward={spec}"])
    assert parents_of(cfg) == {
        "policy": str(tmp_path / "policy"),
        "reward": str(one),
        "reward[1]": str(two),
    }


# --------------------------------------------------------------------------- functions

SOURCE = """
import nowhere  # never run here

def plain(prompts, responses):
    return [1.0] * len(prompts)

def named(prompts, responses, answer, level=1, *, topic, style="b"):
    return []

async def all_of_it(prompt, response, **columns):
    return 1.0

def of_steps(prompts, steps, answer): ...

def few(prompts): ...

def other(a, b): ...

def one(prompt, **columns): ...

def both(prompts, response): ...

def slash(prompts, /, responses): ...

def trl(completions, ground_truth, *, trainer_state, log_extra=None, **kwargs): ...

def verl(data_source, solution_str, ground_truth, extra_info=None): ...

def anything(*args, **kwargs): ...

value = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "checks.py").write_text(SOURCE)
    return tmp_path / "checks.py"


def test_what_names_a_function() -> None:
    assert function_of("a/b.py:f") == (Path("a/b.py"), "f")
    for spec in ("a/b.py", "a/b.py:", "a/b.py:1f", "owner/name", "regex:a.py:f", "lexicon:a.py:f"):
        assert function_of(spec) is None, spec


def test_signatures_are_read_from_the_source(file: Path) -> None:
    plain, named, every, steps = (
        signature_of(file, name) for name in ("plain", "named", "all_of_it", "of_steps")
    )
    assert (plain.columns, plain.takes_all, plain.is_async) == ((), False, False)
    assert named.columns == ("answer", "level", "topic", "style")
    assert named.required == ("answer", "topic")
    assert (every.columns, every.takes_all, every.is_async) == ((), True, True)
    assert (plain.judges, steps.judges) == ("response", "step")
    assert (plain.one_by_one, every.one_by_one, steps.one_by_one) == (False, True, False)
    trl, verl, anything = (signature_of(file, name) for name in ("trl", "verl", "anything"))
    assert trl.given == ("completions", "prompts", "completion_ids")
    assert trl.required == ("ground_truth", "trainer_state")
    assert (verl.given, verl.one_by_one) == (("solution_str",), True)
    assert (verl.columns, verl.required) == (
        ("data_source", "ground_truth", "extra_info"),
        ("data_source", "ground_truth"),
    )
    assert anything.given == ("prompts", "completions", "completion_ids")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nobody",
            "defines no function nobody (functions: plain, named, all_of_it, of_steps, few, other",
        ),
        ("value", "defines no function value"),
        (
            "few",
            "few(prompts) names nothing to judge; parameters are given by name: completions or",
        ),
        ("other", "other(a, b) names nothing to judge"),
        ("one", "names nothing to judge"),
        ("both", "names prompts, a list of a batch, beside response of one response"),
        ("slash", "prompts stands before a / and cannot be given by name"),
    ],
)
def test_a_function_that_is_none(name: str, said: str, file: Path) -> None:
    with pytest.raises(UserError) as told:
        signature_of(file, name)
    assert said in str(told.value) and f"reward={file}:{name}" in str(told.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        signature_of(tmp_path / "a.py", "f")
    (tmp_path / "a.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UserError, match="a.py line 2 is not Python: invalid syntax"):
        signature_of(tmp_path / "a.py", "f")


def test_a_column_that_no_row_has(file: Path) -> None:
    rows = [Prompt("a", {"answer": 1}, "f:1"), Prompt("b", {"topic": 2}, "f:2")]
    check_rows_of(f"{file}:named", rows)  # each stands in some row
    with pytest.raises(
        UserError, match="f:1: .*named needs a column 'topic'; found prompt, answer"
    ):
        check_rows_of(f"{file}:named", rows[:1])
    check_rows_of(f"{file}:all_of_it", rows)
    rows[0].columns["ground_truth"] = None  # null is absent
    with pytest.raises(UserError, match="f:1: .*trl needs a column 'ground_truth'; found prompt"):
        check_rows_of(f"{file}:trl", rows)
    rows[1].columns["reward_model"] = {"ground_truth": "7"}
    with pytest.raises(
        UserError, match="needs a column 'trainer_state'; .* by name are: completions"
    ):
        check_rows_of(f"{file}:trl", rows)


def test_what_a_row_says_elsewhere_than_in_columns() -> None:
    """A dialogue's system message, and a judged row's own responses, where they are named."""
    system = {"role": "system", "content": "Be brief."}
    talk = Prompt(
        [system, {"role": "user", "content": "a"}], beside={"chosen": "b", "label": False}
    )
    assert value_of(talk, "system") == "Be brief."
    assert (value_of(talk, "chosen"), value_of(talk, "label")) == ("b", False)
    assert value_of(talk, "rejected") is None
    assert value_of(Prompt(talk.prompt[1:]), "system") is None
    assert value_of(Prompt("a", {"label": 3}, beside={"label": True}), "label") == 3


# --------------------------------------------------------------------------- preflight


def policy_in(folder: Path) -> Path:
    """A folder that passes for a finished policy."""
    (folder / "stage.json").write_text('{"kind": "policy", "complete": true}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_every_term_is_checked_and_told_before_anything_runs(file: Path) -> None:
    policy = policy_in(file.parent)
    spec = f"length:20 + 2*{file}:plain"
    cfg = compose("grpo", [f"policy={policy}", f"reward={spec}"])
    check_models(cfg)
    assert reward_lines(cfg) == [
        "reward: 1 x length:20: 1 at so many words, falling by 1 / that number with each word more "
        "or less, not below 0",
        f"reward: 2 x {file}:plain: what plain of {file} gives each response",
    ]
    for bad, said in (
        ("length:x", "reward=length needs a number"),
        (f"{file}:nobody", "defines no function nobody"),
        (f"{policy}", "is a policy; reward needs a reward output"),
        (f"{file}", "is a file; reward needs a folder"),
    ):
        with pytest.raises(UserError) as told:
            check_models(compose("grpo", [f"policy={policy}", f"reward=json + {bad}"]))
        assert said in str(told.value)


def test_a_reward_of_another_tokenizer_passes(tmp_path: Path) -> None:
    for name, kind in (("policy", "policy"), ("scorer", "reward")):
        (tmp_path / name).mkdir()
        policy_in(tmp_path / name)
        (tmp_path / name / "stage.json").write_text(json.dumps({"kind": kind}))
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": name}}))
    words = [f"policy={tmp_path}/policy", f"reward={tmp_path}/scorer"]
    check_models(compose("ppo", words))


def test_what_models_stand_for(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text('{"kind": "reward", "level": "step"}')
    assert "those of its steps" in meaning_of(str(tmp_path))
    said = {"beta": 0.1, "per_token": False, "reference": "../sft", "hash": "0"}
    (tmp_path / "stage.json").write_text(json.dumps({"kind": "policy", "implicit_reward": said}))
    assert "beta log(policy / reference)" in meaning_of(str(tmp_path))
