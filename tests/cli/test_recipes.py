"""Every line of every recipe composes; a stand-in for the console script notes the words."""

import os
import subprocess
from pathlib import Path

import pytest

from rlhf_cli.config.catalog import shipped
from rlhf_cli.config.compose import compose

RECIPES = sorted(shipped("recipes").glob("*.sh"))


def lines_of(recipe: Path, folder: Path, **env: str) -> list[list[str]]:
    """The words after rlhf-cli, a list a line."""
    stand_in = folder / "rlhf-cli"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\t" "$@" >> words\necho >> words\n')
    stand_in.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([recipe], cwd=folder, env={"PATH": path, **env}, check=True)
    lines = (folder / "words").read_text().splitlines()
    return [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_line_composes_and_writes_its_own_folder(recipe: Path, tmp_path: Path) -> None:
    lines = [words for words in lines_of(recipe, tmp_path) if words[0] != "report"]
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
