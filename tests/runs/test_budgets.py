"""What auto means on a GPU: by its free memory, and the same for a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.compose import compose
from rlhf_cli.folders.geometry import Geometry
from rlhf_cli.models.save import save_model
from rlhf_cli.runs import budgets
from rlhf_cli.runs.budgets import MOST, UNMEASURED, Budget, budget_of, keep, settle
from rlhf_cli.runs.memory_estimate import parts_of
from rlhf_cli.runs.out_files import BUDGET
from rlhf_cli.runs.pass_sizes import activations
from rlhf_cli.runs.plan_lines import auto_lines
from tests.toys import bpe, llama

DATA = ["data=jsonl", "data.path=rows.jsonl", "data.max_prompt_tokens=100"]
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("budgets") / "policy"
    save_model(llama(len(bpe()), num_hidden_layers=16), bpe(), folder, merge=True)
    return str(folder)


def dpo(policy: str, *words: str) -> Any:
    more = ["data.max_response_tokens=28", "algo.batch_size=64"]
    return compose("dpo", [*DATA, *more, f"policy={policy}", *words])


def test_blocks_are_recomputed_only_where_too_few_tokens_fit(policy: str) -> None:
    """What is held and what activations take are those of the estimate."""
    cfg = dpo(policy, "hardware.logprob_chunk=1024")
    held = sum(parts_of(cfg)[0].values())
    assert budget_of(dpo(policy), 1e12, 4) == Budget(MOST, UNMEASURED[1], 8192, 0)
    geometry = Geometry.of(llama(len(bpe()), num_hidden_layers=16).config.to_dict())
    token = {share: activations(cfg, geometry, 1, 4, share) for share in (0.0, 0.25, 0.5, 1.0)}
    head = 4 * 1024 * len(bpe()) + 4 * 16 * len(bpe())
    for level, share in enumerate(token):
        for tokens, at in ((8300, level), (8100, min(level + 1, 3))):
            free = (held + head + tokens * token[share]) / 0.9
            found = budget_of(cfg, free, 4)
            assert found.level == at
            if at == level:
                assert found.tokens == tokens // 256 * 256
    free = (held + head + 1000 * token[0.0]) / 0.9
    assert budget_of(
        dpo(policy, "hardware.logprob_chunk=1024", "hardware.gradient_checkpointing=false"), free, 4
    ) == Budget(768, UNMEASURED[1])
    assert budget_of(cfg, 1.0, 4) == Budget(256, UNMEASURED[1], 1024, 3)
    assert budget_of(dpo("someone/model"), 1e12, 2) == Budget(*UNMEASURED)


def test_keys_and_values_take_a_quarter_at_most(policy: str) -> None:
    words = [*DATA, f"policy={policy}", "reward=length:20", "data.max_response_tokens=28"]
    cfg = compose("grpo", [*words, "algo.batch_size=4", "algo.minibatch_size=4"])
    responses = 4 * cfg.algo.group_size
    assert budget_of(cfg, 1e12, 2).sampled == responses * 128 // 256 * 256
    words[-1] = "data.max_response_tokens=29"  # in slots of the next size
    cfg = compose("grpo", [*words, "algo.batch_size=4", "algo.minibatch_size=4"])
    assert budget_of(cfg, 1e12, 2).sampled == responses * 192 // 256 * 256
    cfg = compose("generate", [*DATA, f"policy={policy}", "algo.max_tokens=28"])
    assert budget_of(cfg, 2e5 * 2 * 2 * 8 * 16, 2).sampled == 45000 // 256 * 256


def test_a_run_that_goes_on_keeps_its_budget(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(size: float) -> None:
        monkeypatch.setattr(budgets, "free_memory", lambda device: int(size))

    cfg = dpo(policy, f"out={tmp_path}")
    assert settle(cfg, torch.device("cpu"), 4, False) == (None, [])
    free(2**38)
    budget, told = settle(cfg, GPU, 4, False)
    assert budget is not None and cfg.hardware.tokens_at_once == budget.tokens == MOST
    assert told == [
        "hardware, auto: tokens_per_microbatch=32768, rollout_tokens=131072, logprob_chunk=8192 "
        "(256.00 GiB of the GPU are free)"
    ]
    (tmp_path / BUDGET).parent.mkdir()
    keep(budget, tmp_path)
    free(2**20)
    again = dpo(policy, f"out={tmp_path}", "hardware.rollout_tokens=7")
    assert settle(again, GPU, 4, True)[1] == [
        "hardware, auto: tokens_per_microbatch=32768, logprob_chunk=8192 (as before)"
    ]
    assert (again.hardware.tokens_at_once, again.hardware.sampled_at_once) == (MOST, 7)
    fixed = ["hardware.tokens_per_microbatch=5", "hardware.rollout_tokens=7"]
    fixed.append("hardware.logprob_chunk=9")
    assert settle(dpo(policy, *fixed), GPU, 4, True) == (None, [])
    afresh = settle(dpo(policy, f"out={tmp_path}"), GPU, 4, False)[0]  # as overwrite=true does
    assert afresh == budgets.budget_of(cfg, 2**20, 4)
    (tmp_path / BUDGET).write_text("{}")
    assert settle(cfg, GPU, 4, True)[0] == budgets.budget_of(cfg, 2**20, 4)


def test_a_check_tells_what_auto_will_mean() -> None:
    assert auto_lines(compose("sft", ["hardware.device=cpu"])) == [
        "hardware, auto: tokens_per_microbatch 4096, rollout_tokens 16384, logprob_chunk 1024, "
        "gradient_checkpointing once memory runs out, compile false"
    ]
    told = auto_lines(compose("sft", ["hardware=gpu"]))
    assert told[0].startswith("hardware, auto: tokens_per_microbatch by the GPU's free memory, ")
    assert auto_lines(compose("generate", [*DATA, "hardware.rollout_tokens=9"])) == [
        "hardware, auto: tokens_per_microbatch 4096, logprob_chunk 1024"
    ]
