"""Decoding options, in the order of transformers, and the draw: whole steps on the device.

Nothing here waits for the device or has a shape that hangs on values, so that a step may be
captured in a CUDA graph; what there is to do is decided by the options alone. A row's draw depends
on its own logits and noise, whatever is drawn beside it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.config.schema.algorithms import Decoding
from rlhf_cli.models.kernels import tried

BLOCK = 256  # columns of large vocabularies that the draw sums before it looks into one block
HALVINGS = 30  # of the bit patterns between 0 and 1 in float32, until one is left


@dataclass
class Sampling:
    """How tokens are chosen; the meaning of each field stands in config/schema/ (Decoding).

    absent: ids that stand for no token, as rows do that pad an unembedding; they are never drawn.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    absent: tuple[int, ...] = ()

    @classmethod
    def of(cls, algo: Decoding) -> "Sampling":
        """The sampling options of a decoding config."""
        return cls(
            max_tokens=algo.sampled_tokens,
            temperature=algo.temperature,
            top_k=algo.top_k,
            top_p=algo.top_p,
            min_p=algo.min_p,
            repetition_penalty=algo.repetition_penalty,
            min_tokens=algo.min_tokens,
            stop=tuple(algo.stop),
            beams=algo.beams,
            length_penalty=algo.length_penalty,
        )

    @property
    def unfiltered(self) -> bool:
        """Whether samples come from the model's own distribution at some temperature."""
        plain = Sampling(self.max_tokens, self.temperature, stop=self.stop, absent=self.absent)
        return self == plain and self.temperature > 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out as too unlikely."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def scored_at(self) -> float:
        """The temperature at which log-probs are reported: the sampled one, 1 for greedy."""
        return self.temperature or 1.0


class Drawn(NamedTuple):
    """A token for each row.

    ids: (B,).
    logprobs: (B,) before any filter, at `Sampling.scored_at`.
    sound: (B,) False where the logits of a row are not finite.
    """

    ids: Tensor
    logprobs: Tensor
    sound: Tensor


class Chooser:
    """The filters and the draw of some options on a device.

    penalises: whether it is to be told which ids each row has seen.
    """

    def __init__(self, sampling: Sampling, stop_ids: list[int], device: torch.device) -> None:
        """Puts on the device which ids are ruled out, and until which token of a response."""
        self._sampling = sampling
        self.penalises = sampling.repetition_penalty != 1.0
        until = dict.fromkeys(stop_ids, sampling.min_tokens) if sampling.min_tokens else {}
        until |= dict.fromkeys(sampling.absent, torch.iinfo(torch.int32).max)
        self._ruled = torch.tensor(list(until), device=device) if until else None  # (R,)
        self._until = torch.tensor(list(until.values()), dtype=torch.int32, device=device)  # (R,)
        self._within = torch.arange(BLOCK, device=device)
        self._kernels = _kernels() if device.type == "cuda" else None
        self._whole = sampling.temperature > 0 and not sampling.cuts  # kernels do all of it

    def __call__(
        self, logits: Tensor, noise: Tensor, made: Tensor, seen: Tensor | None = None
    ) -> Drawn:
        """A token of each row, by inverting its cumulative distribution at its noise.

        Args:
            logits: (B, V) raw logits; they are left alone.
            noise: (B,) uniform in [0, 1); greedy choices look at none.
            made: (B,) response tokens so far.
            seen: (B, V) whether an id is in a row's prompt or response so far.
        """
        temperature = self._sampling.scored_at
        if self._kernels is not None and self._whole:
            until, penalty = self._until_each(logits), self._sampling.repetition_penalty
            drawn = self._kernels.draw(logits, noise, made, until, seen, temperature, penalty)
            return Drawn(*drawn)
        if logits.element_size() < 4:
            logits = logits.float()
        scaled = logits if temperature == 1.0 else logits / temperature
        allowed = self.allowed(scaled, made, seen)
        if self._sampling.temperature == 0:
            ids = allowed.argmax(-1)  # the place of a NaN where there is one
            own = torch.log_softmax(scaled, -1).gather(-1, ids[:, None])[:, 0]
            return Drawn(ids, own, allowed.gather(-1, ids[:, None])[:, 0].isfinite())
        weights = self.weights(allowed)
        ids, total = self._drawn(weights, noise)
        return Drawn(ids, self._logprobs(scaled, weights, ids, made), total > 0)

    def allowed(self, logits: Tensor, made: Tensor, seen: Tensor | None) -> Tensor:
        """Logits after the repetition penalty, -inf where a token is ruled out by name: (B, V)."""
        penalty = self._sampling.repetition_penalty
        if self.penalises:
            assert seen is not None
            punished = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, punished, logits)
        if self._ruled is not None:
            columns = self._ruled.expand(len(logits), -1)
            kept = logits.gather(-1, columns).masked_fill(self._barred(made), -torch.inf)
            logits = logits.scatter(-1, columns, kept)
        return logits

    def weights(self, allowed: Tensor) -> Tensor:
        """Probabilities of the allowed tokens, 0 where top-k, top-p or min-p leave one out: (B, V).

        Those of a row are not normalised again. Tokens that tie with the last one kept are kept.
        """
        sampling = self._sampling
        weights = torch.softmax(allowed, -1)
        if sampling.top_k:
            last = allowed.topk(min(sampling.top_k, allowed.shape[-1])).values[:, -1:]
            weights = torch.where(allowed >= last, weights, 0)
        if sampling.top_p < 1.0:
            share = sampling.top_p * weights.sum(-1, keepdim=True)
            find = _least_of if self._kernels is None else self._kernels.least_of
            weights = torch.where(weights.float() >= find(weights.float(), share), weights, 0)
        if sampling.min_p > 0.0:
            least = sampling.min_p * weights.amax(-1, keepdim=True)
            weights = torch.where(weights >= least, weights, 0)
        return weights

    def _until_each(self, logits: Tensor) -> Tensor | None:
        """(V,) int32, the tokens that a response has before an id may come; None: all may."""
        if self._ruled is None:
            return None
        until = torch.zeros(logits.shape[-1], dtype=torch.int32, device=logits.device)
        return until.scatter_(0, self._ruled, self._until)

    def _barred(self, made: Tensor) -> Tensor:
        """(B, R) whether a row may not have an id that is ruled out for some time."""
        return made[:, None] < self._until

    def _drawn(self, weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The ids at the noise, and the sums of weights: (B,), (B,).

        The block of columns is found first, then the column in it. Sums of a block are taken in
        float32, as exact as the weights themselves; sums of blocks and all within one in float64.
        """
        size = BLOCK if weights.shape[-1] > BLOCK**2 // 4 else BLOCK // 4  # near the root of V
        whole = weights.shape[-1] // size * size
        sums = weights[:, :whole].unflatten(-1, (-1, size)).sum(-1)
        if whole < weights.shape[-1]:
            sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
        ends = sums.double().cumsum(-1)
        target = noise.double()[:, None] * ends[:, -1:]
        block = _first_above(ends, target)
        start = ends.gather(-1, (block - 1).clamp(min=0)).where(block > 0, 0)
        columns = block * size + self._within[:size]
        last = weights.shape[-1] - 1
        inside = weights.gather(-1, columns.clamp(max=last)).double()
        inside = torch.where(columns <= last, inside, 0).cumsum(-1)
        place = _first_above(inside, target - start)
        # the last weight, if a sum in another order is below what is left of the target
        place = place.minimum((inside < inside[:, -1:]).sum(-1, keepdim=True))
        return (block * size + place)[:, 0].clamp(max=last), ends[:, -1]

    def _logprobs(self, scaled: Tensor, weights: Tensor, ids: Tensor, made: Tensor) -> Tensor:
        """Log-probs of the ids by the logits before filters, by way of their weights: (B,)."""
        ids = ids[:, None]
        if self.penalises:
            return torch.log_softmax(scaled, -1).gather(-1, ids)[:, 0]
        logprobs = weights.gather(-1, ids).log()
        if self._ruled is not None:  # the weights are shares of what was allowed
            own = scaled.gather(-1, ids)
            barred = self._barred(made)
            rest = scaled.index_select(-1, self._ruled).masked_fill(~barred, -torch.inf)
            total = torch.logaddexp(own - logprobs, rest.logsumexp(-1, keepdim=True))
            logprobs = own - total
        return logprobs[:, 0]


@cache
def _kernels() -> Any:
    """The draw without cuts, and the search of top-p, as kernels, if they run."""

    def trial(kernels: Any) -> None:
        one = torch.zeros(1, 1, device="cuda")
        kernels.draw(one, one[0], one[0].long(), None, None, 1.0, 1.0)
        kernels.least_of(one, one)

    return tried("rlhf_cli.rollout.draw_kernels", trial, "draws")


def seen_in(ids: Tensor, entries: int) -> Tensor:
    """Whether each of so many ids is in a row: (B, S) -> (B, entries)."""
    seen = torch.zeros(len(ids), entries, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids, True)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """The first column of growing sums that is above a target: (B, N), (B, 1) -> (B, 1)."""
    return (ends <= target).sum(-1, keepdim=True).clamp_(max=ends.shape[-1] - 1)


def _least_of(weights: Tensor, share: Tensor) -> Tensor:
    """The least weight of the fewest that sum up to a share, ties with it aside: (B, 1).

    A weight belongs to them if those above it sum up to less. Halving the range of bit patterns
    finds the least such number, which costs less than to sort.
    """
    low = torch.zeros_like(share, dtype=torch.int32)
    high = weights.amax(-1, keepdim=True).view(torch.int32)  # floats are in the order of their bits
    for _ in range(HALVINGS):
        middle = (low + high) >> 1
        few = _sum_above(weights, middle.view(torch.float32)) < share
        low, high = torch.where(few, low, middle + 1), torch.where(few, middle, high)
    return high.view(torch.float32)


def _sum_above(weights: Tensor, least: Tensor) -> Tensor:
    """The sum of what is above a number in each row: (B, V), (B, 1) -> (B, 1)."""
    if weights.is_cuda:
        return torch.where(weights > least, weights, 0).sum(-1, keepdim=True)
    # CPUs compare with a number of each row slowly, one by one
    return (weights - least).sign_().relu_().mul_(weights).sum(-1, keepdim=True)
