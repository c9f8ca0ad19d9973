"""A reference that is refreshed from the policy, and comes back from a resume point."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.data.batches import collate
from rlhf_cli.models.adapters import trained
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from tests.model_families import model_of
from tests.toys import hardware_of, llama, sequences_of

SEQUENCES = sequences_of(5)


def policy_of(kind: str) -> Any:
    """A full model, or one with a fresh adapter."""
    model: Any = llama()
    if kind == "full":
        return model
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def outputs(model: nn.Module) -> Tensor:
    return torch.cat(logprobs_of(model, SEQUENCES, hardware_of()))


def train(policy: nn.Module, steps: int = 3) -> None:
    adam = torch.optim.AdamW(trained(policy).values(), 5e-2)
    for _ in range(steps):
        adam.zero_grad()
        (-token_logprobs(policy, collate(SEQUENCES), chunk=9).logprobs.sum() / 20).backward()
        adam.step()


def of_reference(reference: Reference) -> Tensor:
    with reference.active() as frozen:
        return outputs(frozen)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_refreshed_reference_is_the_policy_as_it_was_then(kind: str) -> None:
    policy = policy_of(kind)
    reference = Reference(policy)
    start, first = outputs(policy), reference.hash
    assert reference.tensors() == {}
    train(policy)
    assert torch.equal(of_reference(reference), start) and reference.digest() == first
    for _ in range(2):
        now = outputs(policy)
        trainable = set(trained(policy))
        reference.refresh()
        assert torch.equal(of_reference(reference), now)
        assert reference.hash == reference.digest() != first
        assert set(trained(policy)) == trainable
        train(policy)
        assert torch.equal(of_reference(reference), now)
        assert (outputs(policy) - now).abs().max() > 0.01
        assert reference.hash == reference.digest()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_resumed_run_has_the_reference_of_the_last_refresh(kind: str) -> None:
    policy = policy_of(kind)
    reference = Reference(policy)
    train(policy)
    reference.refresh()
    kept = {name: weight.clone() for name, weight in reference.tensors().items()}
    assert kept
    expected = of_reference(reference)
    train(policy)

    again = policy_of(kind)
    resumed = Reference(again)
    resumed.load({})
    assert resumed.tensors() == {}
    resumed.load(kept)
    assert torch.equal(of_reference(resumed), expected)
    assert resumed.hash == reference.hash == resumed.digest()
    assert all(torch.equal(resumed.tensors()[name], kept[name]) for name in kept)
    assert torch.equal(outputs(again), outputs(policy_of(kind)))  # the policy did not move


def test_a_reference_beside_adapted_experts_is_unchanged() -> None:
    """peft takes a tensor of experts out of its module as it runs, and puts it back at the end."""
    model: Any = model_of("mixtral")
    experts = ["mlp.experts.gate_up_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=experts, task_type="CAUSAL_LM"
    )
    policy = peft.get_peft_model(model, config)
    before = [name for name, _ in policy.named_parameters()]
    reference = Reference(policy)
    train(policy, steps=1)
    assert [name for name, _ in policy.named_parameters()] != before
    assert reference.digest() == reference.hash
