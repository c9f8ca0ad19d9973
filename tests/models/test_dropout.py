"""Dropout is off in every family, and residual dropout reaches every branch of each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states
from rlhf_cli.models.dropout import (
    blocks_of,
    disable_dropout,
    reach_of,
    residual_dropout,
    training_mode,
)
from rlhf_cli.models.recompute import recompute_activations
from tests.model_families import model_of, names
from tests.pace import fast

BATCH = collate([Tokens([5, 6, 7, 8, 9, 10], [11, 12, 13]), Tokens([14, 15], [16])])
# parallel branches are one sum; the mixers of some blocks stand alone
BRANCHES = {"gptj": 1, "codegen": 1, "falcon": 1, "gpt_neox": 1, "phi": 1, "nemotron_h": 1}
BRANCHES |= {"mamba": 1, "falcon_mamba": 1, "mamba2": 1, "gemma4_text": 3, "longcat_flash": 5}
QUICK = ["gpt2", "opt", "bloom", "falcon", "gpt_neox", "seed_oss", "mixtral", "mamba"]
QUICK += ["biogpt", "dbrx", "modernbert_decoder", "gemma2", "phimoe"]
SLOW = [each for each in names() if each not in QUICK]
FAMILIES = fast(QUICK, [*QUICK, *SLOW])


def rates_of(family: str) -> dict[str, float]:
    """All that a family's config calls dropout, but of what it refuses, at 0.3."""
    config = model_of(family).config.get_text_config()
    return {
        name: 0.3
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, int | float)
    }


@torch.no_grad()
def states_of(model: nn.Module) -> Tensor:
    return hidden_states(model, BATCH)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout_of_any_name_in_either_mode(family: str) -> None:
    rates = rates_of(family)
    model = model_of(family, **rates)
    plain = states_of(model)
    disable_dropout(model)
    for _ in range(2):
        torch.testing.assert_close(states_of(model), plain, rtol=0, atol=0)
        model.train()
    config = model.config.get_text_config().to_dict()
    assert {name: config[name] for name in rates} == rates  # what is written


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_dropout_reaches_every_branch(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(family)
    disable_dropout(model)
    plain = states_of(model)
    shares = []
    own = nn.functional.dropout

    def counted(branch: Tensor, p: float, *more: Any, **named: Any) -> Tensor:
        dropped = own(branch, p, *more, **named)
        if p == 0.25:
            shares.append((dropped[branch != 0] == 0).double().mean().item())
        return dropped

    monkeypatch.setattr(nn.functional, "dropout", counted)
    residual_dropout(model, 0.25)
    torch.testing.assert_close(states_of(model), plain, rtol=0, atol=0)
    assert not shares
    torch.manual_seed(0)
    training_mode(model)
    assert not torch.allclose(states_of(model), plain)
    said = capsys.readouterr().err
    if family == "gemma3n_text":
        assert "model.dropout does not reach" in said and "per_layer_projection" in said
        return
    assert "does not reach" not in said
    blocks = len(blocks_of(model))
    assert len(shares) == blocks * BRANCHES.get(family, 2) + (family == "zamba2") * -2
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.05)


def test_dropping_all_branches_leaves_the_embeddings() -> None:
    model = model_of("gpt2")
    disable_dropout(model)
    residual_dropout(model, 1 - 1e-12)
    training_mode(model)
    base = model.transformer
    embedded = base.wte(BATCH.ids) + base.wpe(BATCH.positions)
    torch.testing.assert_close(states_of(model), base.ln_f(embedded))


def test_recomputed_blocks_drop_the_same() -> None:
    gradients = []
    for recomputes in (False, True):
        model = model_of("llama")
        disable_dropout(model)
        if recomputes:
            recompute_activations(model)
        residual_dropout(model, 0.4)
        training_mode(model)
        torch.manual_seed(1)
        hidden_states(model, BATCH).square().sum().backward()
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        gradients.append({name: grad for name, grad in grads.items() if grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.overrides._get_current_function_mode_stack()


class Stubborn(nn.Module):
    """An MLP that drops in training mode whatever it is told."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.5, self.training)


def test_noise_out_of_reach_is_told_where_it_would_matter() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp = Stubborn()
    disable_dropout(model)
    residual_dropout(model, 0.1)  # the MLP stays in evaluation mode

    model = model_of("llama")
    kind = type(model.model.layers[1])

    class Noisy(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **named: Any) -> Any:
            return nn.functional.dropout(super().forward(*args, **named), 0.5, self.training)

    model.model.layers[1].__class__ = Noisy
    disable_dropout(model)
    with pytest.raises(UserError, match="LlamaForCausalLM computes something else in training"):
        recompute_activations(model)


def test_what_residual_dropout_does_not_reach_is_named() -> None:
    model = model_of("llama")
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: layer.mlp(output))
    disable_dropout(model)
    found, beyond = reach_of(model)
    assert found == 4
    assert beyond == [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
