"""Working copies and masters where a model is on another device than it was read on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.adapters import restore, snapshot, trained
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.masters import master_of
from rlhf_cli.models.save import save_model
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.toys import bpe, composed, hardware_of, llama, model_of, sequences_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOKENIZER = bpe()
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"frozen_layers": 1},
    "lora": {"lora_rank": 2, "merge_lora": False},
    "merged": {"lora_rank": 2, "merge_lora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_what_is_written(kind: str, tmp_path: Path) -> None:
    """Masters lie beside the weights, follow through steps, and go to disk as they are."""
    save_model(llama(len(TOKENIZER)), TOKENIZER, tmp_path / "policy", merge=False)
    config = replace(model_of(dtype="bfloat16"), **KINDS[kind])
    model = load_policy(str(tmp_path / "policy"), config, TOKENIZER, CUDA)
    weights = trained(model)
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert {(master_of(each).device.type, master_of(each).dtype) for each in weights.values()} == {
        ("cuda", torch.float32)
    }
    addresses = [weight.data_ptr() for weight in model.parameters()]

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences, CUDA)
        states = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
        return states.float().square().mean(), {}

    algo = replace(composed("dpo").algo, lr=1e-2, warmup_steps=0)
    optimizer = Optimizer({"policy": (model, 1e-2)}, algo, 9, hardware_of())
    before = snapshot(model)
    sequences = sequences_of(4)
    report = optimizer.step([LossTerm([sequences[:2], sequences[2:]], loss, 2)])
    assert report["skipped"] == 0 and report["grad_norm/policy"] > 0
    after = {name: master_of(weight).detach() for name, weight in weights.items()}
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(torch.equal(weights[name], after[name].bfloat16()) for name in after)
    assert {master_of(each).grad.dtype for each in weights.values()} == {torch.float32}  # type: ignore[union-attr]

    kept = {name: value.cpu().clone() for name, value in after.items()}
    restore(model, before)
    restore(model, kept)
    assert all(torch.equal(master_of(weights[name]).cpu(), kept[name]) for name in kept)
    save_model(model, TOKENIZER, tmp_path / "out", merge=config.merge_lora)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = load_file(file)
    assert {value.dtype for value in written.values()} == {torch.float32}
    first = load_file(tmp_path / "policy" / "model.safetensors")
    for name, value in written.items():
        if not config.lora_rank:
            assert torch.equal(value, kept.get(name, first[name]))
        elif config.merge_lora and "norm" in name:
            assert torch.equal(value, first[name])
    assert [weight.data_ptr() for weight in model.parameters()] == addresses
