"""Log-probs and scores of batches. Only response positions reach the unembedding, in chunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import Batch
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import hidden_states, linear_head, unembed, unwrap
from rlhf_cli.models.heads import scalar_head
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.logprob_head import HeadScores, head_scores
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.sharding import head_gathered
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
    predictors = batch.before.flatten()[batch.scored]  # (N,)
    targets = batch.ids.flatten()[batch.at.flatten()[batch.scored]]  # (N,)
    states = hidden_states(model, batch).flatten(0, 1)[predictors]  # (N, d)
    theirs = None
    if reference is not None:
        with reference.active() as frozen:
            theirs = hidden_states(frozen, batch).flatten(0, 1)[predictors]  # (N, d)
    scored = _score_targets(
        model, states, targets, chunk, temperature, with_entropy, reference, theirs
    )

    def grid(values: Tensor | None) -> Tensor | None:
        return None if values is None else on_grid(batch.response, values, batch.scored)

    return TokenLogprobs(
        on_grid(batch.response, scored.logprobs, batch.scored),
        grid(scored.entropy),
        None if value_head is None else grid(value_head(states.float())[:, 0]),
        grid(scored.kl),
    )


def response_nll(model: nn.Module, sequences: Sequence[Tokens], hardware: Hardware) -> Tensor:
    """Negative log-likelihood summed over all response tokens of a micro-batch, with gradient."""
    batch = batch_of(model, sequences, layout_of(model, hardware))
    scored = token_logprobs(model, batch, chunk=hardware.logits_at_once)
    return nll_sum(scored.logprobs, batch.response)


def distillation_kl(
    model: nn.Module, batch: Batch, reference: Reference, theirs: Batch, *, chunk: int
) -> Tensor:
    """KL(reference || model) of the next token at each response token, with gradient: (N,) in nats.

    Context distillation, 2112.00861 sec. 2.1.2: the reference reads the responses after prompts of
    its own, and all that it says of a token is to be said without them.

    Args:
        batch: what the model reads.
        theirs: the same responses in the same order, as the reference reads them.
        chunk: positions whose logits exist at once.
    """
    states = hidden_states(model, batch).flatten(0, 1)[batch.before.flatten()[batch.scored]]
    with reference.active() as frozen:
        places = theirs.before.flatten()[theirs.scored]  # (N,)
        other = hidden_states(frozen, theirs).flatten(0, 1)[places]  # (N, d)

    def divergence(states: Tensor, other: Tensor) -> list[Tensor | None]:
        with reference.active() as frozen:
            target = unembed(frozen, other)
        return [full_kl(target, unembed(model, states))]

    with head_gathered(model, reference.model):
        (kl,) = _in_chunks(divergence, chunk, states, other)
    assert kl is not None
    return kl


def _in_chunks(
    score: Callable[..., list[Tensor | None]], chunk: int, *columns: Tensor | None
) -> list[Tensor | None]:
    """What `score` gives for so many rows at a time, joined; computed again in backward.

    Args:
        columns: (N, ...) each, or None.
    """
    first = columns[0]
    assert first is not None
    recompute = torch.is_grad_enabled() and len(first) > chunk
    parts = []
    for start in range(0, len(first), chunk):
        rows = slice(start, start + chunk)
        piece = [None if each is None else each[rows] for each in columns]
        if recompute:
            parts.append(checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(*piece))
    joined = zip(*parts, strict=True)
    return [None if each[0] is None else torch.cat(each) for each in joined]


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

    with head_gathered(model, *(() if reference is None else [reference.model])):
        columns = _in_chunks(score, chunk, states, targets, theirs)
    return HeadScores(*columns)  # type: ignore[arg-type]


def on_grid(mask: Tensor, values: Tensor, places: Tensor | None = None) -> Tensor:
    """The values, (N,), where the mask is True; zero elsewhere.

    Args:
        places: (N,) of True in the flat mask; None asks the device for them, which is waited for.
    """
    grid = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    if places is None:
        return grid.masked_scatter(mask, values)
    return grid.flatten().index_put((places,), values).view(mask.shape)


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
    return score_head(model, response_states(model, batch))


def response_states(model: nn.Module, batch: Batch) -> Tensor:
    """What the scalar head reads at the last token of each response: (S, d)."""
    return hidden_states(model, batch).flatten(0, 1)[batch.at[:, -1]]


def state_values(critic: nn.Module, batch: Batch) -> Tensor:
    """V of the state in which each token was drawn: the head at the token before it, (S, R).

    Args:
        batch: with a grid over whole sequences.
    """
    scores = token_scores(critic, batch)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], -1)


def trunk_values(policy: nn.Module, head: nn.Linear, batch: Batch) -> Tensor:
    """What `state_values` gives, by a value head on the policy's trunk: (S, R)."""
    values = head(hidden_states(policy, batch).float()).flatten()  # (B T,)
    return nn.functional.pad(values[batch.at][:, :-1], (1, 0))
