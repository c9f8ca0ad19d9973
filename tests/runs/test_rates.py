"""Rates by the size of the model: what is given wins, the demo keeps its own, all is told."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.runs.preflight import preflight
from rlhf_cli.runs.rates import RATES, choose_rates, rate_of, size_of
from tests.tiny import DATA, words_of


def model_of(folder: Path, parameters: int) -> str:
    """A folder whose header tells of so many weights, without them."""
    entry = {"dtype": "F32", "shape": [parameters // 10, 10], "data_offsets": [0, 0]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return str(folder)


@pytest.mark.parametrize(
    ("role", "parameters", "adapter", "rate"),
    [
        ("sft", 131_072, False, 5e-3),
        ("sft", 131_072, True, 5e-3),
        ("sft", 134_515_008, False, 1e-4),
        ("sft", 7.2e9, False, 2e-5),
        ("sft", 7.2e9, True, 2e-4),
        ("dpo", 8e9, False, 5e-7),
        ("dpo", 8e9, True, 5e-6),
        ("dpo", 70e9, False, 2e-7),
        ("reward", 6e9, False, 9e-6),
        ("ppo", 2e6, False, 3e-4),
        ("ppo", 2e6 + 1, False, 3e-6),
        ("grpo", 7e9, False, 1e-6),
    ],
)
def test_rates_by_hand(role: str, parameters: float, adapter: bool, rate: float) -> None:
    assert rate_of(role, parameters, adapter) == pytest.approx(rate, rel=1e-12)


def test_larger_models_never_take_more() -> None:
    for role, rates in RATES.items():
        assert list(rates) == sorted(rates, reverse=True), role
        assert rates[0] > 10 * rates[1], role  # what ruins a pretrained model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("meta-llama/Llama-3.1-8B", 8e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("EleutherAI/pythia-70m-deduped", 70e6),
        ("01-ai/Yi-6B-200K", 6e9),
        ("openai-community/gpt2", None),
        ("nowhere/at_all", None),
    ],
)
def test_a_name_on_the_hub_tells_the_size(name: str, parameters: float | None) -> None:
    assert size_of(name) == parameters


def test_the_rate_follows_the_model_and_is_told(tmp_path: Path) -> None:
    policy = model_of(tmp_path / "policy", 134_515_000)
    cfg = compose("ppo", [f"policy={policy}"])
    lines = choose_rates(cfg)
    assert (cfg.algo.lr, cfg.algo.value_lr) == (3e-6, 1e-5)
    assert lines == [
        "algo.lr: 3e-06 (ppo of a model of 135M parameters, full weights; that of the demo is "
        "0.0003)",
        "algo.value_lr: 1e-05 (critic of a model of 135M parameters, full weights; that of the "
        "demo is 0.001)",
    ]
    assert choose_rates(cfg) == []  # what is filled in is as if it had been given


@pytest.mark.parametrize(
    ("words", "lr", "value_lr"),
    [
        (["algo.lr=3e-4"], 3e-4, 1e-5),
        (["algo=instructgpt"], 8.05e-6, 9e-6),
        (["model=lora"], 3e-5, 1e-4),
        (["algo=reinforce"], 3e-6, None),
    ],
)
def test_what_is_given_wins(
    words: list[str], lr: float, value_lr: float | None, tmp_path: Path
) -> None:
    cfg = compose("ppo", [f"policy={model_of(tmp_path / 'policy', 5 * 10**8)}", *words])
    choose_rates(cfg)
    assert cfg.algo.lr == pytest.approx(lr) and cfg.algo.value_lr == (
        value_lr if value_lr is None else pytest.approx(value_lr)
    )


def test_a_refreshed_reward_model_counts_by_its_own_size(tmp_path: Path) -> None:
    policy, reward = (model_of(tmp_path / name, n * 10**9) for name, n in (("p", 1), ("r", 7)))
    words = [f"policy={policy}", f"reward={reward}", "judge=length:3", "algo=grpo_iterative"]
    cfg = compose("grpo", words)
    choose_rates(cfg)
    assert (cfg.algo.lr, cfg.algo.refresh_lr) == (2e-6, 9e-6)


def test_a_model_of_unknown_size_is_taken_for_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from runs in whose place this one would stand
    cfg = compose("sft", ["model=pretrained", "model.path=nowhere/at_all"])
    (line,) = choose_rates(cfg)
    assert cfg.algo.lr == 1e-5 and "of unknown size" in line


@pytest.mark.usefixtures("inside")
def test_a_finished_run_stays_so_without_its_parent(tmp_path: Path) -> None:
    """And config.yaml has the rate, by which a resume and a reader know it."""
    from rlhf_cli.stages import dpo

    policy, out = tmp_path / "policy", tmp_path / "out"
    shutil.copytree("runs/demo/sft", policy)
    words = [word for word in words_of("dpo") if "algo.lr=" not in word]
    cfg = compose("dpo", [*words, f"policy={policy}", f"out={out}"])
    dpo.run(cfg)
    assert "  lr: 0.0002\n" in (out / "config.yaml").read_text()
    shutil.rmtree(policy)
    plan = preflight(compose("dpo", [*words, f"policy={policy}", f"out={out}"]))
    assert plan.state == "finished"


@pytest.mark.usefixtures("inside")
def test_the_plan_has_the_line() -> None:
    cfg = compose("reward", [*DATA, "out=runs/new"])
    assert any(line.startswith("algo.lr: 0.002 (reward of") for line in preflight(cfg).at_start())


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs/hardware.md"
    lines = page.read_text().split("\n## Learning rates")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    roles = [name for cell in cells[0][1:] for name in cell.split(", ")]
    for place, row in enumerate(cells[2:]):
        rates = [[float(rate) for rate in cell.split(", ")] for cell in row[1:]]
        rates[3] = rates[3] if len(rates[3]) == 2 else rates[3] * 2
        told = dict(zip(roles, [rate for each in rates for rate in each], strict=True))
        assert told == {role: RATES[role][place] for role in roles}
