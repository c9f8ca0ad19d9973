"""Log-probs and scores of batches. Only response positions reach the unembedding, in chunks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import Batch


@dataclass
class TokenLogprobs:
    """logprobs, entropy: (B, T), of the response tokens; zero elsewhere. entropy if asked for."""

    logprobs: Tensor
    entropy: Tensor | None


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
        output = trunk(model)(
            input_ids=batch.ids,
            attention_mask=batch.attention.long(),
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


def token_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    chunk: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """log p(x_t | x_<t) at the response tokens of a batch, with gradient where it is enabled.

    Args:
        chunk: positions whose logits exist at once, in forward and, by recomputation, in backward.
        temperature: the one that the tokens were sampled with.
        with_entropy: also the entropy of each of those distributions, in nats.
    """
    hidden = hidden_states(model, batch)  # (B, T, d)
    predicts = batch.response[:, 1:]  # logits at t - 1 score the token at t
    states = hidden[:, :-1][predicts]  # (N, d)
    targets = batch.ids[:, 1:][predicts]  # (N,)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = unembed(model, states, temperature)
        logprobs = torch.log_softmax(logits, -1)
        taken = logprobs.gather(-1, targets[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else taken.detach()
        return taken, entropy

    recompute = torch.is_grad_enabled() and len(targets) > chunk
    parts = []
    for start in range(0, len(targets), chunk):
        piece = states[start : start + chunk], targets[start : start + chunk]
        if recompute:
            parts.append(checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(*piece))
    grid = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
    logprobs, entropy = (
        grid.masked_scatter(batch.response, torch.cat(column))
        for column in zip(*parts, strict=True)
    )
    return TokenLogprobs(logprobs, entropy if with_entropy else None)


def score_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """The scalar head, always in float32: bfloat16 would round scores into ties.

    (..., d) -> (...).
    """
    scores: Tensor = unwrap(model).score(hidden.float())
    return scores[..., 0]


def token_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The scalar head at every token, in float32: (B, T). Only real tokens mean anything."""
    return score_head(model, hidden_states(model, batch))


def state_values(critic: nn.Module, batch: Batch) -> Tensor:
    """V of the state in which each token was drawn: the head at the token before it, (B, T)."""
    scores = token_scores(critic, batch)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], -1)


def sequence_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The scalar head at the last real token of each sequence: (B,)."""
    last = batch.attention.sum(-1) - 1
    hidden = hidden_states(model, batch)[torch.arange(len(batch)), last]  # (B, d)
    return score_head(model, hidden)


@torch.no_grad()
def check_unembedding(model: nn.Module) -> None:
    """Stop where a model computes its logits in a way that `unembed` does not know.

    Raises:
        UserError: naming the architecture.
    """
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None]
    ones = torch.ones_like(ids, dtype=torch.bool)
    ours = unembed(model, hidden_states(model, Batch(ids, ones, ones)))
    theirs = unwrap(model)(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        name = type(unwrap(model)).__name__
        raise UserError(f"{name} scales its logits in its own way, which is not supported yet")
