"""Log-probs and scores of batches. Only response positions reach the unembedding, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_cli.data.batches import Batch, collate, collate_answers, sharing_pays
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.models.decoder import (
    embedding_rows,
    hidden_states,
    linear_head,
    matmul_in_float32,
    run_trunk,
    unembed,
    unwrap,
)
from rlhf_cli.models.heads import scalar_head
from rlhf_cli.models.logprob_head import HeadScores, head_scores
from rlhf_cli.models.reference import Reference
from rlhf_cli.objectives.kl import full_kl
from rlhf_cli.objectives.likelihood import nll_sum


@dataclass
class TokenLogprobs:
    """What the policy says of the response tokens: (S, R) each, zero elsewhere, None if not asked.

    logprobs: log-prob of the token.
    entropy: of the distribution that it was drawn from, in nats.
    values: of the state in which it was drawn, by a value head on the policy's trunk.
    kl: KL(policy || reference) of that distribution, exact, in nats.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    kl: Tensor | None = None


def token_logprobs(
    model: nn.Module,
    batch: Batch,
    *,
    chunk: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    value_head: nn.Linear | None = None,
    reference: Reference | None = None,
) -> TokenLogprobs:
    """log p(x_t | x_<t) at the response tokens of a batch, with gradient where it is enabled.

    Args:
        chunk: positions whose logits exist at once, in forward and, by recomputation, in backward.
        temperature: the one that the tokens were sampled with.
        with_entropy: also the entropy of each of those distributions.
        value_head: also its value of each state, in float32, from the same pass of the trunk.
        reference: also the KL to it of each distribution, at the same temperature; it has a pass
            of its own, without gradient.
    """
    predictors = batch.before[batch.response]  # (N,)
    states = hidden_states(model, batch).flatten(0, 1)[predictors]  # (N, d)
    targets = batch.ids.flatten()[batch.at[batch.response]]  # (N,)
    theirs = None
    if reference is not None:
        with reference.active() as frozen:
            theirs = hidden_states(frozen, batch).flatten(0, 1)[predictors]  # (N, d)
    scored = _score_targets(
        model, states, targets, chunk, temperature, with_entropy, reference, theirs
    )

    def grid(values: Tensor | None) -> Tensor | None:
        return None if values is None else on_grid(batch.response, values)

    return TokenLogprobs(
        on_grid(batch.response, scored.logprobs),
        grid(scored.entropy),
        None if value_head is None else grid(value_head(states.float())[:, 0]),
        grid(scored.kl),
    )


def response_nll(model: nn.Module, sequences: Sequence[Tokens], *, chunk: int) -> Tensor:
    """Negative log-likelihood summed over all response tokens of a micro-batch, with gradient."""
    batch = collate(sequences, next(model.parameters()).device)
    return nll_sum(token_logprobs(model, batch, chunk=chunk).logprobs, batch.response)


def _score_targets(
    model: nn.Module,
    states: Tensor,
    targets: Tensor,
    chunk: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    reference: Reference | None = None,
    theirs: Tensor | None = None,
) -> HeadScores:
    """Log-probs of the targets and, if asked for, entropy and KL of their distributions.

    Logits of `chunk` states exist at once.

    Args:
        states: (N, d), that predict the targets.
        targets: (N,) ids.
        theirs: (N, d) states of the reference, if there is one.
    """
    head, other = linear_head(model), None
    if reference is not None and theirs is not None and (plain := linear_head(reference.model)):
        other = (plain, theirs)
    if head is None or (reference is not None and other is None):
        return _by_recomputation(
            model, states, targets, chunk, temperature, with_entropy, reference, theirs
        )
    return head_scores(
        head,
        states,
        targets,
        chunk=chunk,
        temperature=temperature,
        with_entropy=with_entropy,
        reference=other,
    )


def _by_recomputation(
    model: nn.Module,
    states: Tensor,
    targets: Tensor,
    chunk: int,
    temperature: float,
    with_entropy: bool,
    reference: Reference | None,
    theirs: Tensor | None,
) -> HeadScores:
    """`_score_targets` of any head: chunks of logits that are computed again in backward."""

    def score(states: Tensor, targets: Tensor, theirs: Tensor | None) -> list[Tensor | None]:
        logits = unembed(model, states, temperature)
        logprobs = torch.log_softmax(logits, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None
        kl = None
        if reference is not None and theirs is not None:
            with reference.active() as frozen:
                reference_logits = unembed(frozen, theirs, temperature)
            kl = full_kl(logits, reference_logits)
        return [logprobs.gather(-1, targets[:, None])[:, 0], entropy, kl]

    recompute = torch.is_grad_enabled() and len(targets) > chunk
    parts = []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        piece = states[rows], targets[rows], None if theirs is None else theirs[rows]
        if recompute:
            parts.append(checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(*piece))
    columns = [None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)]
    return HeadScores(*columns)  # type: ignore[arg-type]


def on_grid(mask: Tensor, values: Tensor) -> Tensor:
    """The values, (N,), where the mask is True; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(
        mask, values
    )


def score_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """The scalar head, always in float32: bfloat16 would round scores into ties.

    (..., d) -> (...).
    """
    scores: Tensor = scalar_head(unwrap(model))(hidden.float())
    return scores[..., 0]


def token_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The scalar head at every token of the grid, in float32: (S, R); at pads the last token's."""
    return score_head(model, hidden_states(model, batch).flatten(0, 1)[batch.at])


def response_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The scalar head at the last token of each response: (S,)."""
    return score_head(model, hidden_states(model, batch).flatten(0, 1)[batch.at[:, -1]])


def state_values(critic: nn.Module, batch: Batch) -> Tensor:
    """V of the state in which each token was drawn: the head at the token before it, (B, T).

    Args:
        batch: with a grid over whole sequences.
    """
    scores = token_scores(critic, batch)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], -1)


def trunk_values(policy: nn.Module, head: nn.Linear, batch: Batch) -> Tensor:
    """What `state_values` gives, by a value head on the policy's trunk: (B, T)."""
    values = head(hidden_states(policy, batch)[:, :-1].float())[..., 0]  # (B, T - 1)
    return nn.functional.pad(values, (1, 0))


def answer_batch(model: nn.Module, groups: Sequence[Answers], share: bool) -> Batch:
    """The groups on the model's device, with each prompt once where `share` allows it and it pays.

    Args:
        share: whether the model computes the same in both layouts, by `shares_prompts`.
    """
    width = unwrap(model).config.get_text_config().hidden_size
    device = next(model.parameters()).device
    return collate_answers(groups, device, share and sharing_pays(groups, width))


@torch.no_grad()
def shares_prompts(model: nn.Module) -> bool:
    """Whether a row of several responses to one prompt gives what each response alone gives.

    Attention must follow a mask of who sees whom, positions the given ones, and no state may run
    along the row. A short probe shows it; windows, which are longer, are read from the config.
    """
    config = unwrap(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    full = all(kind == "full_attention" for kind in kinds) and not any(windows)
    if config._attn_implementation != "sdpa" or not full:
        return False
    device = next(model.parameters()).device
    vocabulary = embedding_rows(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (20,), generator=draw).tolist()
    groups = [
        Answers(ids[:5], [ids[5:9], ids[9:12]], None),
        Answers(ids[12:14], [ids[14:15], ids[15:18], ids[18:]], None),
    ]
    states = []
    try:
        for share in (True, False):
            batch = collate_answers(groups, device, share)
            hidden = run_trunk(model, batch).flatten(0, 1)
            states.append(hidden[batch.at[batch.response]])  # (N, d)
    except Exception:  # models refuse a mask that they do not know in many ways
        return False
    together, alone = states
    rounded = 1e-3 if matmul_in_float32(model) else 5e-2  # far below any leak
    return bool((together - alone).norm() <= rounded * alone.norm())
