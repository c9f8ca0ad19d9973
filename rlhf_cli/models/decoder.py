"""The parts of a language model: the decoder without its head, and the head that gives logits."""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import Batch, collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.router_watch import watched


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a peft model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def trunk(model: nn.Module) -> nn.Module:
    """The decoder without its head, adapters included."""
    base = unwrap(model)
    body: nn.Module = getattr(base, base.base_model_prefix)
    return body


def matmul_in_float32(model: nn.Module) -> bool:
    """Whether model.dtype asks for float32 matrix products."""
    return bool(getattr(unwrap(model), "compute_dtype", torch.float32) == torch.float32)


def matmul_type(model: nn.Module) -> torch.autocast:
    """Matrix products in model.dtype; weights, sums and log-probs stay float32."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=not matmul_in_float32(model))


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states, (B, T, d)."""
    with matmul_type(model):
        return run_trunk(model, batch)


@watched
def run_trunk(model: nn.Module, batch: Batch) -> Tensor:
    # a padding mask is 0 and 1; a mask of who sees whom is bool, or it would be added to the logits
    padding = batch.attention.ndim == 2
    output = trunk(model)(
        input_ids=batch.ids,
        attention_mask=batch.attention.long() if padding else batch.attention,
        position_ids=batch.positions,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def unembed(model: nn.Module, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits in float32, divided by the temperature: (N, d) -> (N, V)."""
    base = unwrap(model)
    with matmul_type(model):
        logits = base.get_output_embeddings()(hidden).float()
    cap = getattr(base.config, "final_logit_softcapping", None)  # Gemma 2
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits / temperature


@torch.no_grad()
def check_unembedding(model: nn.Module) -> None:
    """Stop where a model computes its logits in a way that `unembed` does not know.

    Raises:
        UserError: naming the architecture.
    """
    device = next(model.parameters()).device
    batch = collate([Tokens([0, 1], [2, 3])], device)
    ours = unembed(model, hidden_states(model, batch))
    theirs = unwrap(model)(input_ids=batch.ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        name = type(unwrap(model)).__name__
        raise UserError(f"{name} scales its logits in its own way, which is not supported yet")
