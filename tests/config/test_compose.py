"""Every shipped option composes with every stage that it belongs to, and every key is explained."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import PpoConfig
from rlhf_cli.config.stages import STAGES
from rlhf_cli.rewards.shaping import overlong_tokens
from tests.pace import fast

CONF = catalog.shipped("conf")
DIRS = catalog.config_dirs()

OPTIONS = [
    (stage, group, option)
    for group in catalog.GROUPS
    for option in catalog.options(group, DIRS)
    for stage in catalog.stages_of(group, option, DIRS)
]

# What a user has to say besides the option, because it has no sound default.
NEEDED = {
    option: ["data.path=rows.jsonl"]
    for option in catalog.options("data", DIRS)
    if option not in ("demo", "hh", "gsm8k")
}
NEEDED["grpo_iterative"] = ["judge=length:20"]
NEEDED["distill"] = ["model=pretrained", "data.prefix=prefix.txt"]
# The demo brings plain text, and prompts that a tiny model has room for; other data does not.
OTHER_DATA = {"sft": ["algo.text_mix=0", "model=pretrained"]}


def words_for(stage: str, group: str, option: str) -> list[str]:
    words = [f"{group}={option}", *NEEDED.get(option, [])]
    return words + (OTHER_DATA.get(stage, []) if group == "data" and option != "demo" else [])


FIRST = set({option[1:]: option for option in reversed(OPTIONS)}.values())


@pytest.mark.parametrize(("stage", "group", "option"), fast(FIRST, OPTIONS))
def test_an_option_composes_with_its_stages(stage: str, group: str, option: str) -> None:
    config = compose(stage, words_for(stage, group, option))
    assert type(config) is STAGES[stage].config


@pytest.mark.parametrize("group", catalog.GROUPS)
def test_every_option_belongs_to_a_stage(group: str) -> None:
    for option in catalog.options(group, DIRS):
        assert catalog.stages_of(group, option, DIRS), f"{group}/{option} fits no stage"


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_a_meaning_and_a_value(stage: str) -> None:
    values = catalog.stage_values(stage, {}, DIRS)
    assert set(values) == set(catalog.keys(stage))
    for key, field in catalog.keys(stage).items():
        meaning = field.metadata["meaning"]
        assert meaning.endswith("."), f"{key}: {meaning!r} is no sentence"
        assert catalog.describe(stage, key)


@pytest.mark.parametrize("stage", STAGES)
def test_what_help_reads_is_what_hydra_composes(stage: str) -> None:
    config = compose(stage, [])
    for key, written in catalog.stage_values(stage, {}, DIRS).items():
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        if "${" not in str(written):
            assert value == (written if isinstance(value, str) else _parsed(written)), key


def _parsed(written: object) -> object:
    """A value as written, read as YAML; numbers such as 2e-4 are words to a plain YAML reader."""
    if not isinstance(written, str):
        return written
    try:
        return float(written)
    except ValueError:
        return yaml.safe_load(written) if written in ("null", "true", "false") else written


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_an_option_repeats_no_value_of_its_base(file: Path) -> None:
    if file.parent == CONF:
        return
    defaults, own = catalog.read(file)
    bases = [base for base in defaults if base != "_self_"]
    inherited: dict[str, object] = {}
    for base in bases:
        inherited |= catalog.option_values(file.parent.name, base, DIRS)
    assert not {key for key in own if key in inherited and own[key] == inherited[key]}


def test_the_schema_has_no_values() -> None:
    for stage in STAGES.values():
        for field in dataclasses.fields(stage.config):
            assert field.default is dataclasses.MISSING
            assert field.default_factory is dataclasses.MISSING


def test_values_arrive_typed() -> None:
    config = compose("ppo", ["algo=ppo_ptx", "algo.kl_coef=1e-1", "algo.max_grad_norm=null"])
    assert isinstance(config, PpoConfig)
    assert config.algo.kl_coef == 0.1
    assert config.algo.max_grad_norm is None
    assert config.algo.ptx_coef > 0
    assert config.algo.max_tokens == config.data.max_response_tokens
    assert config.policy == "runs/demo/sft"


def test_a_name_moves_the_whole_chain() -> None:
    config = compose("ppo", ["name=mine"])
    assert (config.out, config.policy) == ("runs/mine/ppo", "runs/mine/sft")
    assert config.reward == "runs/mine/reward"


@pytest.mark.parametrize(
    "word", ["data.columns.prompt=question", "data.columns={prompt: question}"]
)
def test_columns_take_new_entries_without_a_plus(word: str) -> None:
    assert compose("sft", [word]).data.columns == {"prompt": "question"}


def test_own_options_inherit_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text("defaults: [ppo, _self_]\nkl_coef: 0.3\n")
    config = compose("ppo", ["algo=mine"], config_dir=str(tmp_path))
    assert config.algo.kl_coef == 0.3
    assert config.algo.lam == compose("ppo", []).algo.lam


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("defaults: [ppo, _self_]\nkl_coeff: 0.3\n", "did you mean algo.kl_coef? (in algo/mine"),
        ("defaults: [ppo, _self_]\nkl_coef: high\n", "algo.kl_coef must be a number >= 0"),
        ("defaults: [dpo, _self_]\nbeta: 0.3\n", "algo=mine belongs to `rlhf-cli dpo`"),
        ("kl_coef: 0.3\n", "ppo needs algo.loss=VALUE"),
        ("loss: hinge\n", "algo=mine belongs to `rlhf-cli dpo`"),
        ("defaults: [ppo, _self_]\nrefills: 1\n", "belongs to `rlhf-cli grpo` (in algo/mine.yaml)"),
        (
            "defaults: [steps, _self_]\n",
            "algo=steps is called algo=process now, and belongs to `rlhf-cli reward`",
        ),
        ("kl_coef: [0.3\n", "mine.yaml line 2: not YAML"),
        ("0.3\n", "mine.yaml must hold KEY: VALUE lines"),
    ],
)
def test_a_slip_in_an_own_option_is_named(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose("ppo", ["algo=mine"], config_dir=str(tmp_path))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_may_break_lines_on_the_command_line() -> None:
    cfg = compose("dpo", [r'data.template="User: {prompt}\nAssistant: "'])
    assert cfg.data.template == "User: {prompt}\nAssistant: "


def test_ziegler_is_the_published_code() -> None:
    """lm-human-preferences: Adam as it comes, no cut gradient, whitened rewards keep their mean."""
    algo = compose("ppo", ["algo=ziegler"]).algo
    assert (algo.adam_beta1, algo.adam_beta2, algo.max_grad_norm) == (0.9, 0.999, None)
    assert (algo.temperature, algo.whiten_rewards, algo.critic) == (0.7, "whiten", "shared")


def test_the_overlong_punishment_of_dapo_follows_the_limit() -> None:
    for tokens, soft in ((20_480, 4096), (32, 6), (3, 1)):
        algo = compose("grpo", ["algo=dapo", f"algo.max_tokens={tokens}"]).algo
        assert overlong_tokens(algo) == soft
    assert overlong_tokens(replace(algo, overlong_tokens=8)) == 8


@pytest.mark.parametrize(
    ("stage", "word", "name"),
    [
        ("evaluate", "baselines=[[]]", "baselines[0]"),
        ("evaluate", "baselines=[a,{}]", "baselines[1]"),
        ("evaluate", "baselines=[[a]]", "baselines[0]"),
        ("ppo", "algo.stop_on=[[]]", "algo.stop_on[0]"),
        ("sft", "data.columns={prompt:[]}", "data.columns.prompt"),
        ("sft", "data.columns={prompt:{a:b}}", "data.columns.prompt"),
    ],
)
def test_lists_and_maps_hold_plain_values(stage: str, word: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(stage, [word])
    assert str(caught.value).startswith(f"{name} must be one value, got ")


def test_a_path_to_rows_is_a_text_or_a_list_of_texts() -> None:
    """Named in help as such, and kept as it was given."""
    for given, path in {
        "rows/*.jsonl": "rows/*.jsonl",
        "[a.jsonl,'b, c.csv']": ["a.jsonl", "b, c.csv"],
        '"~/rows"': "~/rows",
        "1.10": "1.10",
        "7": "7",
    }.items():
        data = compose("dpo", ["data=jsonl", f"data.path={given}", f"data.eval_path={given}"]).data
        assert (data.path, data.eval_path, data.text_path) == (path, path, None)
    assert catalog.describe("dpo", "data.path") == "text, a list of texts, or null"
    for wrong, why in {
        "[]": "data.path is empty",
        "' '": "data.path is empty",
        "[a,'']": "data.path is empty",
        "[a,[b]]": r"data.path\[1\] must be one value",
        "{a: b}": "data.path",
    }.items():
        with pytest.raises(UserError, match=why):
            compose("dpo", ["data=jsonl", f"data.path={wrong}"])


def test_auto_stands_for_a_number_or_a_choice() -> None:
    hardware = compose("sft", []).hardware
    assert (hardware.tokens_per_microbatch, hardware.gradient_checkpointing) == ("auto", "auto")
    assert (hardware.tokens_at_once, hardware.sampled_at_once) == (4096, 16384)
    words = ["hardware.tokens_per_microbatch=5", "hardware.gradient_checkpointing=true"]
    hardware = compose("sft", words).hardware
    assert (hardware.tokens_at_once, hardware.gradient_checkpointing) == (5, True)
    for word, what in {
        "tokens_per_microbatch=fast": "auto or an integer >= 1, got fast",
        "tokens_per_microbatch=0": "auto or an integer >= 1, got 0",
        "rollout_tokens=true": "auto or an integer >= 1, got True",
        "gradient_checkpointing=1": "auto or true|false, got 1",
        "gradient_checkpointing=null": "auto or true|false, got null",
    }.items():
        with pytest.raises(UserError) as caught:
            compose("sft", [f"hardware.{word}"])
        assert str(caught.value) == f"hardware.{word.partition('=')[0]} must be {what}"
