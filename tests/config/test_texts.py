"""Text keys keep what was typed, on the command line and in YAML files; a line break is written."""

from pathlib import Path

import pytest

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_files import dump
from rlhf_cli.config.stages import STAGES
from rlhf_cli.config.texts import as_typed, line_breaks, load, requoted, text_keys

TYPED = (
    "1.10",
    "1e5",
    "true",
    "007",
    "1_000",
    "0x10",
    "on",
    "2024-01-01",
    "a=b",
    "~/x",
    "é",
    "1:30",
)


@pytest.mark.parametrize("text", TYPED)
def test_a_word_keeps_its_text(text: str) -> None:
    cfg = compose("sft", [f"name={text}"])
    assert (cfg.name, cfg.out) == (text, f"runs/{text}/sft")


@pytest.mark.parametrize("text", TYPED)
def test_a_file_keeps_its_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text(
        f"defaults: [demo, _self_]\nstep_join: {text}\ncolumns:\n  prompt: {text}\neval_rows: 7\n"
    )
    data = compose("sft", ["data=mine"], str(tmp_path)).data
    assert (data.step_join, data.columns, data.eval_rows) == (text, {"prompt": text}, 7)


def test_lists_and_maps_keep_their_texts() -> None:
    words = ['algo.stop=["\\n",1.10,"a\\\\nb"]', "data.columns.prompt=1.10", "seed=0"]
    cfg = compose("generate", words)
    assert cfg.algo.stop == ["\n", "1.10", "a\\nb"]
    assert (cfg.data.columns, cfg.seed) == ({"prompt": "1.10"}, 0)
    assert compose("evaluate", ["baselines=[1e5,b]"]).baselines == ["1e5", "b"]


def test_null_keeps_its_meaning() -> None:
    assert compose("dpo", ["reference=null"]).reference is None
    assert compose("dpo", ['reference="null"']).reference == "null"
    with pytest.raises(UserError, match="name must be text, got null"):
        compose("dpo", ["name=null"])


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (r'data.step_join="\n\n"', "\n\n"),
        (r"data.step_join=\n\n", "\n\n"),
        (r"data.step_join=a\\nb", r"a\nb"),
        (r'data.step_join="a\\nb\t"', "a\\nb\t"),
        (r'data.step_join="a\\\nb"', "a\\\nb"),
        ("data.step_join= ", " "),
        ("data.step_join=Q: {x}\\nA: ", "Q: {x}\nA: "),
        ("data.step_join='it\"s'", 'it"s'),
    ],
)
def test_line_breaks_and_blanks(word: str, text: str) -> None:
    assert compose("sft", [word]).data.step_join == text


def test_regular_expressions_keep_their_backslashes() -> None:
    assert compose("sft", [r'data.step_end="\d\\n\n"']).data.step_end == r"\d\\n\n"
    assert compose("ppo", [r'reward="regex:\\n\d"']).reward == r"regex:\\n\d"


def test_line_breaks_are_those_of_odd_backslashes() -> None:
    assert line_breaks(r"\n \\n \\\n \x \\") == "\n \\n \\\n \\x \\\\"


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("name=1.10,1.2", 'name="1.10","1.2"'),
        ("name=choice(1.10,b)", 'name=choice("1.10","b")'),
        ("name=range(1,3)", "name=range(1,3)"),
        ("name=shuffle(1,2,seed=1)", 'name=shuffle("1","2",seed=1)'),
        ("name=a,null", 'name="a",null'),
        ("algo.lr=1e-4,1e-5", "algo.lr=1e-4,1e-5"),
        ("algo=ppo,a2c", "algo=ppo,a2c"),
        ("name=[a", "name=[a"),
        ("out=runs/${name}", 'out="runs/${name}"'),
    ],
)
def test_sweeps_are_quoted_value_by_value(word: str, read: str) -> None:
    assert as_typed([word], sweep=True) == [read]


def test_a_comma_without_a_sweep_is_left_to_hydra() -> None:
    assert as_typed(["name=a,b"]) == ["name=a,b"]


def test_files_are_yaml_but_for_texts() -> None:
    text = "name: 1.10\nseed: 1_0\ndata: {step_join: '\\n', template: \"\\\\n\", step_end: \\n}\n"
    text += "<<: {out: 1e5}\nalgo: {stop: [on, ~, &x 1.0]}\n"
    assert load(text) == {
        "name": "1.10",
        "seed": 10,
        "data": {"step_join": "\n", "template": "\\n", "step_end": "\\n"},
        "out": "1e5",
        "algo": {"stop": ["on", None, "1.0"]},
    }
    assert load("step_join: 1.0\neval_rows: 1", "data") == {"step_join": "1.0", "eval_rows": 1}


def test_what_is_written_is_read_as_the_same() -> None:
    content = {"name": "1.10", "data": {"step_join": r"a\nb", "template": "x\\\n\\t"}, "out": "on"}
    assert load(dump(content)) == content
    assert load(requoted("data:\n  step_join: a\\nb\n")) == {"data": {"step_join": r"a\nb"}}


def test_a_key_is_text_in_all_stages_or_none() -> None:
    for stage in STAGES:
        for key, field in catalog.keys(stage).items():
            is_text = catalog.is_text(field.type) or field.metadata["texts"]
            assert is_text == (key in text_keys()), f"{stage}: {key}"
