"""The engine of several ranks: prompts are dealt out, and every rank has all responses.

Each draw is fixed by the place of its prompt among all, so that in float32 texts are the same
whoever makes them; log-probs differ by the rounding of what was sampled beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import nn

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.items import EncodedPrompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.layouts import layout_of
from rlhf_cli.models.sharding import held_whole
from rlhf_cli.ranks.agreement import on_every_rank
from rlhf_cli.ranks.progress import Share
from rlhf_cli.ranks.world import world
from rlhf_cli.rollout.decode import Completion, evaluation_mode
from rlhf_cli.rollout.engine import Engine, Order
from rlhf_cli.rollout.native import FILLS
from rlhf_cli.rollout.rollouts import Rollout, as_rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import fits_slots, give_up_slots

REASONS = ("length", "eos", "stop")


@dataclass
class Done:
    """The prompts of a run that need not be sampled again, by place in it, without responses."""

    done: Mapping[int, list[Rollout]]

    def keep(self, made: Mapping[int, list[Rollout]]) -> None:
        """Nothing: they are kept once they are gathered."""


class RankedEngine(Engine):
    """Deals prompts to the engine that each rank has of its own."""

    def __init__(self, own: Engine, model: nn.Module, encoder: Encoder, hardware: Hardware) -> None:
        """`own`: of this rank. The encoder reads the ids that other ranks have drawn."""
        self._own, self._model = own, model
        self._encoder, self._hardware = encoder, hardware

    @property
    def exact(self) -> bool:
        """Whether the engines of all ranks are, which are alike."""
        return self._own.exact

    def update(self, model: nn.Module) -> None:
        """Every rank samples from these weights; all have the same."""
        self._own.update(model)
        self._model = model

    def _made(self, order: Order) -> Iterator[dict[int, list[Rollout]]]:
        """All responses, on every rank; where they are kept, in rounds.

        Rounds and shares are those of all prompts, whatever is left of them, so that a run that
        goes on on as many ranks ends with the same digits.
        """
        prompts, sampling, samples = order.prompts, order.sampling, order.samples
        wanted = set(order.left)
        needs = [len(ids) + samples * sampling.max_tokens for _, ids in prompts]
        rounds = list(self._rounds(needs)) if order.resumable else [range(len(prompts))]
        for places in rounds:
            left = [place for place in places if place in wanted]
            if not left:
                continue
            run = even_runs(places, needs, world().size)[world().rank]
            own_left = [place for place in run if place in wanted]
            bar = Share(order.advance, len(left) * samples, len(own_left) * samples)
            with held_whole(self._model):
                self._find_out(prompts, sampling)
                own = on_every_rank(partial(self._own_share, order, run, own_left, bar.advance))
            completions = iter(gathered(own))
            yield {
                place: [
                    as_rollout(*prompts[place], next(completions), self._encoder, sampling)
                    for _ in range(samples)
                ]
                for place in left
            }
            bar.finish()

    def _own_share(
        self, order: Order, run: range, left: Sequence[int], told: Callable[[int], None]
    ) -> list[Rollout]:
        """The responses to those of a run that are left."""
        if not left:
            return []
        there: dict[int, list[Rollout]] = {
            place - run.start: [] for place in run if place not in left
        }
        return self._own.sample(
            order.prompts[run.start : run.stop],
            order.sampling,
            samples=order.samples,
            first=order.first + run.start,
            seed=order.seed,
            advance=told,
            kept=Done(there) if order.resumable else None,
        )

    def _find_out(self, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> None:
        """What all ranks must be at one about, before any works by itself.

        They sample in slots on all ranks or on none, for one may lack the memory to try them. What
        layout the model takes is kept, where one scores its samples and another has none.
        """
        layout_of(self._model, self._hardware)
        if sampling.beams > 1:
            return
        reach = max((len(ids) for _, ids in prompts), default=0) + sampling.max_tokens
        with evaluation_mode(self._model):
            fit = fits_slots(self._model, reach)
        if not world().all(fit) and fit:
            give_up_slots(self._model)

    def _rounds(self, needs: Sequence[int]) -> Iterator[range]:
        """Runs of places that give each rank about what one process samples between two looks."""
        budget = world().size * FILLS * self._hardware.sampled_at_once
        start = tokens = 0
        for place, need in enumerate(needs):
            if tokens and tokens + need > budget:
                yield range(start, place)
                start, tokens = place, 0
            tokens += need
        if tokens:
            yield range(start, len(needs))


def even_runs(places: range, needs: Sequence[int], count: int) -> list[range]:
    """Places in so many runs, in order, that need about as much as each other; some may be empty.

    So no rank has all of the long prompts.
    """
    own = [needs[place] for place in places]
    total = sum(own)
    middles = [2 * upto - need for upto, need in zip(accumulate(own), own, strict=True)]
    ends = [sum(each * count < 2 * total * part for each in middles) for part in range(count + 1)]
    return [places[start:end] for start, end in pairwise(ends)]


def gathered(own: Sequence[Rollout]) -> list[Completion]:
    """The completions of all ranks, rank by rank."""
    reasons = torch.tensor([REASONS.index(each.finish_reason) for each in own], dtype=torch.int64)
    ids = [torch.tensor(each.tokens.response, dtype=torch.int64) for each in own]
    # float64 holds what an engine says to the last digit
    logprobs = [torch.tensor(each.logprobs, dtype=torch.float64) for each in own]
    all_reasons = torch.cat(world().gather([reasons])).tolist()
    columns = zip(all_reasons, world().gather(ids), world().gather(logprobs), strict=True)
    return [Completion(row.tolist(), of_row.tolist(), REASONS[i]) for i, row, of_row in columns]
