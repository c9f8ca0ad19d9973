"""A key says itself what reads it: it has a value there, and nowhere else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.keys import OPTIONS
from rlhf_cli.config.stages import STAGES
from rlhf_cli.config.switches import needed_by, used_by

RULED = [(stage, key) for stage in STAGES for key in catalog.keys(stage) if used_by(stage, key)]


@pytest.mark.parametrize(("stage", "key"), RULED)
def test_a_switch_is_a_key_that_has_the_values_named(stage: str, key: str) -> None:
    for switch in (used_by(stage, key), needed_by(stage, key)):
        if switch is None:
            continue
        assert switch.key in catalog.keys(stage)
        assert switch.key != key
        known = catalog.choices(stage, switch.key)
        assert not known or set(switch.values or known) <= set(known)


def test_every_word_of_a_switch_is_known_to_a_stage() -> None:
    """A slip in `used_by` or `needed` would turn a rule off without a sound."""
    for stage in STAGES:
        for key, field in catalog.keys(stage).items():
            for told in (field.metadata.get("used_by"), field.metadata["needed"]):
                if not isinstance(told, str) or told == OPTIONS or "=" not in told:
                    continue
                name, _, values = told.partition("=")
                known = {word for each in STAGES for word in _choices(each, name)}
                assert not known or set(values.split("|")) <= known, f"{key}: {told}"


def _choices(stage: str, key: str) -> tuple[str, ...]:
    return catalog.choices(stage, key) if key in catalog.keys(stage) else ()


@pytest.mark.parametrize(
    ("stage", "key", "losses"),
    [
        ("dpo", "algo.beta", "dpo hinge kto length_normalised plackett_luce robust simpo"),
        ("dpo", "algo.label_smoothing", "dpo length_normalised robust"),
        ("dpo", "algo.soft_labels", "dpo ipo ipo_mean length_normalised"),
        ("dpo", "algo.tau", "ipo ipo_mean"),
        ("dpo", "algo.gamma", "simpo"),
        ("dpo", "algo.lam", "orpo"),
        ("dpo", "algo.alpha", "unlikelihood"),
        ("dpo", "algo.desirable_weight", "kto"),
        ("reward", "algo.row_margin", "bradley_terry token"),
        ("reward", "algo.label_smoothing", "bradley_terry token"),
        ("reward", "algo.soft_labels", "bradley_terry token"),
        ("reward", "algo.centring", "bradley_terry token"),
        ("reward", "algo.target", "pointwise"),
        ("reward", "algo.aggregate", "process token"),
        ("ppo", "algo.clip", "clip"),
        ("grpo", "algo.clip", "clip sequence_clip cispo"),
    ],
)
def test_the_losses_that_read_a_key(stage: str, key: str, losses: str) -> None:
    switch = used_by(stage, key)
    assert switch is not None and switch.key == "algo.loss"
    assert switch.values is not None and set(losses.split()) <= set(switch.values)
    unread = {"ipo", "hinge", "orpo", "preferred_ft", "kwise", "klpen"} - set(losses.split())
    assert not unread & set(switch.values)


@pytest.mark.parametrize(
    ("stage", "losses"),
    [
        (
            "dpo",
            "dpo hinge ipo ipo_mean kto length_normalised orpo plackett_luce preferred_ft robust "
            "simpo unlikelihood",
        ),
        ("reward", "bradley_terry kwise plackett_luce pointwise process token"),
    ],
)
def test_the_shipped_options_tell_the_losses(stage: str, losses: str) -> None:
    """And a loss more needs no line here."""
    assert set(losses.split()) <= set(catalog.choices(stage, "algo.loss"))


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of conf/ in the place of the shipped one."""
    copy = tmp_path / "conf"
    shutil.copytree(catalog.shipped("conf"), copy)
    monkeypatch.setattr(catalog, "shipped", lambda folder: copy.parent / folder)
    yield copy


def test_a_new_loss_is_told_by_its_option_alone(conf: Path) -> None:
    (conf / "algo" / "new.yaml").write_text(
        "defaults: [dpo, _self_]\nloss: new\nlabel_smoothing: null\nlam: 0.3\n"
    )
    cfg = compose("dpo", ["algo=new"])
    assert (cfg.algo.loss, cfg.algo.lam, cfg.algo.label_smoothing) == ("new", 0.3, None)
    assert "new" in catalog.choices("dpo", "algo.loss")
    assert "new" not in catalog.choices("reward", "algo.loss")
    for word, part in {
        "algo.lam=null": "algo.loss=new needs algo.lam; algo=new brings a value",
        "algo.tau=1": "algo.tau is not used by algo.loss=new; set it to null",
        "algo.loss=orpo": "algo.beta is not used by algo.loss=orpo",
    }.items():
        with pytest.raises(UserError) as caught:
            compose("dpo", ["algo=new", word])
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        # what is missing comes before what is too much
        (
            "dpo algo.loss=orpo",
            "algo.loss=orpo needs algo.lam; algo=orpo brings a value",
        ),
        # the stage's own option has the key: only the switch was changed
        (
            "dpo algo=orpo algo.beta=1",
            "algo.beta is not used by algo.loss=orpo; set it to null, as algo=orpo does",
        ),
        # it has not: the key was given for another switch
        (
            "dpo algo.tau=1",
            "algo.tau is not used by algo.loss=dpo; set it to null, or take algo=ipo, which uses "
            "it",
        ),
        # no option has another switch
        (
            "sft algo.lr_schedule=linear",
            "algo.min_lr_ratio is not used by algo.lr_schedule=linear; set it to 0, or set "
            "algo.lr_schedule=cosine",
        ),
    ],
)
def test_a_complaint_says_what_to_do(words: str, line: str) -> None:
    stage, *overrides = words.split()
    with pytest.raises(UserError) as caught:
        compose(stage, overrides)
    assert str(caught.value) == line
