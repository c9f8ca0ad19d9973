"""Every line of every recipe composes; a stand-in for the console script notes the words."""

import os
import subprocess
from pathlib import Path

import pytest

from rlhf_cli.config.catalog import shipped
from rlhf_cli.config.compose import compose
from rlhf_cli.data.sources import sources_of

RECIPES = sorted(shipped("recipes").glob("*.sh"))
# `rounds` names the policy that the next round labels: that of the newest evaluation
STAND_IN = r"""#!/bin/sh
printf '%s\t' "$@" >> words
echo >> words
[ "$1" = rounds ] && [ -z "$SETTLED" ] || exit 0
for newest; do :; done
echo "${newest%/*}/policy"
"""


def lines_of(recipe: Path, folder: Path, **env: str) -> list[list[str]]:
    """The words after rlhf-cli, a list a line."""
    stand_in = folder / "rlhf-cli"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([recipe], cwd=folder, env={"PATH": path, **env}, check=True)
    lines = (folder / "words").read_text().splitlines()
    return [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_line_composes_and_writes_its_own_folder(recipe: Path, tmp_path: Path) -> None:
    lines = [words for words in lines_of(recipe, tmp_path) if words[0] not in ("report", "rounds")]
    outs = [compose(stage, words).out for stage, *words in lines]
    assert len(outs) == len(set(outs)) >= 4


def test_the_demo_is_the_chain_of_defaults(tmp_path: Path) -> None:
    chain = "sft, reward, ppo algo=ppo_ptx, dpo, grpo, generate, evaluate, report name=demo"
    lines = lines_of(shipped("recipes") / "demo.sh", tmp_path)
    assert ", ".join(" ".join(words) for words in lines) == chain


def test_dpo_takes_sft_and_reward_from_the_ppo_recipe(tmp_path: Path) -> None:
    folders = [tmp_path / "ppo", tmp_path / "dpo"]
    for folder in folders:
        folder.mkdir()
    ppo, dpo = (
        lines_of(shipped("recipes") / f"hh_{folder.name}.sh", folder, TEXT="t.jsonl")
        for folder in folders
    )
    assert ppo[:2] == dpo[:2]


def test_overrides_add_to_the_sizes_of_a_small_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for recipe, variable, stage in (
        ("hh_ppo", "PPO", "ppo"),
        ("hh_dpo", "DPO", "dpo"),
        ("gsm8k_grpo", "GRPO", "grpo"),
        ("stories_lexicon", "PPO", "ppo"),
    ):
        folder = tmp_path / recipe
        folder.mkdir()
        env = {"MODEL": str(model), variable: "algo.max_grad_norm=0.5"}
        lines = lines_of(shipped("recipes") / f"{recipe}.sh", folder, **env)
        (words,) = [words for name, *words in lines if name == stage]
        cfg = compose(stage, words)
        assert cfg.algo.max_grad_norm == 0.5
        assert cfg.algo.lr >= 1e-4  # not that of a large model


def test_variables_override_what_a_recipe_says(tmp_path: Path) -> None:
    env = {
        "MODEL": "my model",
        "DATA": "my rows.jsonl",
        "NAME": "mine",
        "TEXT": "my text.jsonl",
        "COMMON": "data.eval_rows=7 seed=3",
        "PPO": "algo.steps=2 algo.lr=0.5",
    }
    lines = lines_of(shipped("recipes") / "hh_ppo.sh", tmp_path, **env)
    sft, _, ppo, generate, _ = (compose(stage, words) for stage, *words in lines)
    assert (sft.model.path, sft.out) == ("my model", "runs/mine/sft")
    assert {cfg.data.path for cfg in (sft, ppo, generate)} == {"my rows.jsonl"}
    assert (ppo.data.eval_rows, ppo.seed) == (7, 3)
    assert (ppo.algo.steps, ppo.algo.lr, ppo.algo.ptx_coef) == (2, 0.5, 1.0)
    assert ppo.data.text_path == "my text.jsonl"


@pytest.mark.parametrize("recipe", ["online", "online_dpo"])
def test_rounds_ask_new_prompts_and_learn_from_the_labels_of_all(
    recipe: str, tmp_path: Path
) -> None:
    lines = lines_of(shipped("recipes") / f"{recipe}.sh", tmp_path, ROUNDS="4")
    learner = "dpo" if recipe == "online_dpo" else "reward"
    place = f"runs/{recipe}"
    labels, learners, reports = (
        [compose(stage, words) for stage, *words in lines if stage == name]
        for name in ("label", learner, "evaluate")
    )
    assert len(labels) == len(learners) == len(reports) == 4
    for number, label in enumerate(labels):
        before = [f"{place}/round{i}" for i in range(1, number + 1)]
        assert label.asked == [f"{each}/label/tasks.jsonl" for each in before]
        policies = [f"{before[-1]}/policy", f"{place}/sft"] if before else [f"{place}/sft"]
        assert [label.policy, *label.baselines] == policies
        own = learners[number]
        sources = sources_of(own.data)
        assert [Path(each.path).parent for each in sources] == [
            Path(f"{place}/round{i}/label") for i in range(1, number + 2)
        ]
        *older, newest = (each.weight or 0.0 for each in sources)
        assert newest >= sum(older) and len(set(older)) <= 1
        assert (
            own.policy == f"{place}/sft" and own.data.eval_share == reports[number].data.eval_share
        )
        assert reports[number].baselines[0] == reports[number].reference == f"{place}/sft"
        assert len(reports[number].baselines) == number + 1


def test_rounds_end_once_nothing_is_gained(tmp_path: Path) -> None:
    """`rounds` names no policy then."""
    lines = lines_of(shipped("recipes") / "online.sh", tmp_path, ROUNDS="4", SETTLED="1")
    assert [words[0] for words in lines].count("evaluate") == 1 and lines[-1][0] == "rounds"
