"""What is told of each stage once."""

from typing import get_args

import pytest

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.stages import (
    ROWS_OF_LOSS,
    STAGES,
    WITHOUT_REFERENCE,
    facts_of,
    has_reference,
    makers_of,
    place_in_chain,
    row_kind_name,
    stage_name,
)
from rlhf_cli.data.kinds import Row, kind_named, name_of

DIRS = catalog.config_dirs()


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_finds_its_facts(stage: str) -> None:
    cfg = compose(stage, [])
    assert stage_name(cfg) == stage
    assert facts_of(cfg) is STAGES[stage]
    assert cfg.trains == (STAGES[stage].writes in ("policy", "reward"))
    assert cfg.samples_online == (stage in ("ppo", "grpo"))
    assert cfg.start == (None if stage == "sft" else cfg.policy)


def test_every_word_for_rows_names_a_kind() -> None:
    words = {stage.rows for stage in STAGES.values()} | set(ROWS_OF_LOSS.values())
    assert words <= {name_of(kind) for kind in get_args(Row)}
    assert all(name_of(kind_named(word)) == word for word in words)


def test_every_loss_of_the_tables_is_shipped() -> None:
    for loss in (*ROWS_OF_LOSS, *WITHOUT_REFERENCE):
        stages = catalog.stages_of("algo", loss, DIRS)
        assert stages and set(stages) <= {"reward", "dpo"}
        for stage in stages:
            cfg = compose(stage, [f"algo={loss}"])
            assert row_kind_name(cfg) == ROWS_OF_LOSS.get(loss, "preference")
            assert has_reference(cfg) == (stage == "dpo" and loss not in WITHOUT_REFERENCE)


def test_who_is_compared_with_a_reference() -> None:
    assert [stage for stage in STAGES if has_reference(compose(stage, []))] == [
        "ppo",
        "dpo",
        "grpo",
    ]


def test_the_chain() -> None:
    assert makers_of("policy") == ["sft", "ppo", "dpo", "grpo"]
    assert makers_of("reward") == ["reward"]
    assert sorted(["evaluate", "nonsense", "sft"], key=place_in_chain)[0] == "sft"
    assert place_in_chain("nonsense") == place_in_chain(None) == len(STAGES)
