"""The engine of this process: the policy's own weights, the batched decoder and beam search."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.batches import cut
from rlhf_cli.data.items import EncodedPrompt, Tokens
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.out_of_memory import halves, in_groups, oom_error
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.tokenizers import ids_of_no_token
from rlhf_cli.rollout.beam import beam_search
from rlhf_cli.rollout.decode import Completion, decode, evaluation_mode
from rlhf_cli.rollout.engine import Engine, Order
from rlhf_cli.rollout.feeding import way_of
from rlhf_cli.rollout.rollouts import Rollout, as_rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import fits_slots, give_up_slots
from rlhf_cli.rollout.slot_run import Job
from rlhf_cli.rollout.slot_sampler import SlotSampler

FILLS = 4  # times that the prompts of a group fill all slots


@dataclass
class Draws:
    """Some of the samples of the prompt at a place."""

    place: int
    samples: range


class NativeEngine(Engine):
    """Decodes with the policy's own module, so that it always has the newest weights.

    Each draw is fixed by the seed, the prompt's place, the sample and the token, never by what is
    drawn beside it. Responses are drawn in slots where the model allows it, else in batches of
    prompts of like length.
    """

    def __init__(
        self, model: nn.Module, encoder: Encoder, hardware: Hardware, compiles: bool = False
    ) -> None:
        """The encoder says which ids end a response.

        Args:
            compiles: whether pieces of a GPU's steps are compiled.
        """
        self._model = model
        self._encoder = encoder
        self._absent = ids_of_no_token(model, encoder.tokenizer)
        self._hardware = hardware
        self._slots = SlotSampler(encoder.stop_ids, encoder.text, compiles)

    @property
    def exact(self) -> bool:
        """Whether products are in float32; in bfloat16 a cached pass rounds otherwise."""
        return matmul_in_float32(self._model)

    def update(self, model: nn.Module) -> None:
        """Decode with this module from now on; its weights are not copied."""
        self._model = model

    def _made(self, order: Order) -> Iterator[dict[int, list[Rollout]]]:
        """Responses drawn one by one, or with sampling.beams > 1 the best of a search."""
        prompts, left, samples = order.prompts, order.left, order.samples
        sampling = replace(order.sampling, absent=self._absent)
        if sampling.beams == 1:
            origin = order.seed, order.first
            parts = self._drawn(prompts, left, sampling, samples, origin, order.resumable)
        else:
            parts = self._searched(prompts, left, sampling, samples)
        for part in parts:
            yield {
                place: [
                    as_rollout(*prompts[place], completion, self._encoder, sampling)
                    for completion in completions
                ]
                for place, completions in part.items()
            }
            order.advance(len(part) * samples)

    def _drawn(
        self,
        prompts: Sequence[EncodedPrompt],
        left: Collection[int],
        sampling: Sampling,
        samples: int,
        origin: tuple[int, int],
        in_groups: bool,
    ) -> Iterator[dict[int, list[Completion]]]:
        """Sampled responses to the prompts that are left, by place, as they are done.

        Args:
            origin: the seed, and the place that the first prompt has among all that are sampled.
            in_groups: whether a run may go on with what is left of them.
        """
        waiting = set(left)
        reach = max((len(ids) for _, ids in prompts), default=0) + sampling.max_tokens
        with evaluation_mode(self._model):
            slots = fits_slots(self._model, reach)
        if slots:
            try:
                for part in self._in_slots(prompts, left, sampling, samples, origin, in_groups):
                    waiting -= set(part)
                    yield part
            except RunError:
                raise
            except Exception:  # kernels refuse what they do not know in many ways
                give_up_slots(self._model)
        if waiting:
            yield from self._in_batches(prompts, waiting, sampling, samples, origin)

    def _groups(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, samples: int, times: int
    ) -> list[list[int]]:
        """The places of prompts whose responses fill hardware.rollout_tokens so many times.

        Groups are those of all prompts, whatever is left of them: a sum of floats is rounded as its
        batch has it, and a run that goes on is to end with the same digits.
        """
        return cut(
            range(len(prompts)),
            times * self._hardware.sampled_at_once,
            lambda i: (len(prompts[i][1]) + sampling.max_tokens) * samples,
        )

    def _in_slots(
        self,
        prompts: Sequence[EncodedPrompt],
        left: Collection[int],
        sampling: Sampling,
        samples: int,
        origin: tuple[int, int],
        in_groups: bool,
    ) -> Iterator[dict[int, list[Completion]]]:
        """`_drawn` in slots, which are refilled from all prompts or from those of a group.

        A group is done as a whole, so that a run that goes on has whole ones left.
        """
        wanted = set(left)
        groups = self._groups(prompts, sampling, samples, FILLS) if in_groups else [sorted(left)]
        for places in filter(None, ([i for i in group if i in wanted] for group in groups)):
            jobs = [
                job
                for i in places
                for job in self._jobs(i, prompts[i][1], samples, sampling, origin)
            ]
            found: dict[int, dict[int, Completion]] = {i: {} for i in places}
            budget = self._hardware.sampled_at_once
            for drawn in self._slots.draw(self._model, jobs, sampling, budget):
                for number, completion in drawn:
                    found[places[number // samples]][number % samples] = completion
                if not in_groups or all(len(own) == samples for own in found.values()):
                    done = [i for i, own in found.items() if len(own) == samples]
                    of = {i: found.pop(i) for i in done}
                    if of:
                        yield {i: [own[k] for k in range(samples)] for i, own in of.items()}

    def _jobs(
        self,
        place: int,
        ids: list[int],
        samples: int,
        sampling: Sampling,
        origin: tuple[int, int],
    ) -> list[Job]:
        """The samples of the prompt at a place; their noise is made when the first begins."""
        seed, first = origin
        noise = cache(partial(uniform_noise, seed, first + place, samples, sampling.max_tokens))
        return [Job(ids, lambda k=k: noise()[k]) for k in range(samples)]  # type: ignore[misc]

    def _in_batches(
        self,
        prompts: Sequence[EncodedPrompt],
        left: Collection[int],
        sampling: Sampling,
        samples: int,
        origin: tuple[int, int],
    ) -> Iterator[dict[int, list[Completion]]]:
        """`_drawn` by the plain decoder."""
        seed, first = origin
        groups = self._groups(prompts, sampling, samples, 1)

        def draw(group: list[Draws]) -> list[Completion]:
            ids = [prompts[each.place][1] for each in group]
            longest = sampling.max_tokens
            noise = [
                uniform_noise(seed, first + each.place, samples, longest)[list(each.samples)]
                for each in group
            ]
            stop_ids, text_of = self._encoder.stop_ids, self._encoder.text
            drawn = decode(self._model, ids, torch.cat(noise), sampling, stop_ids, text_of)
            of_each = [own for own, each in zip(ids, group, strict=True) for _ in each.samples]
            return self._scored_as_whole(of_each, drawn, sampling)

        def failure(group: list[Draws]) -> RunError:
            longest = len(prompts[group[0].place][1]) + sampling.max_tokens
            return oom_error("sampling", 1, longest)

        wanted = set(left)
        whole = [[Draws(i, range(samples)) for i in group if i in wanted] for group in groups]
        completions: dict[int, list[Completion]] = {}
        for group, decoded in in_groups(filter(None, whole), draw, failure, fewer_draws):
            in_turn = iter(decoded)
            for each in group:
                own = completions.setdefault(each.place, [])
                own += [next(in_turn) for _ in each.samples]
            done = [place for place, own in completions.items() if len(own) == samples]
            yield {place: completions.pop(place) for place in done}

    def _scored_as_whole(
        self, prompts: list[list[int]], drawn: list[Completion], sampling: Sampling
    ) -> list[Completion]:
        """The same with the log-probs that training computes, where a state came to others.

        Some decoders compute a step of their recurrence otherwise than a pass over a whole text.
        """
        if not self.exact or way_of(self._model).exact:
            return drawn
        sequences = [Tokens(*each) for each in zip(prompts, (x.ids for x in drawn), strict=True)]
        scored = logprobs_of(self._model, sequences, self._hardware, sampling.scored_at)
        pairs = zip(drawn, scored, strict=True)
        return [replace(each, logprobs=logprobs.tolist()) for each, logprobs in pairs]

    def _searched(
        self,
        prompts: Sequence[EncodedPrompt],
        left: Sequence[int],
        sampling: Sampling,
        samples: int,
    ) -> Iterator[dict[int, list[Completion]]]:
        """The best hypotheses of a beam search for each prompt that is left, by place."""
        chunk = self._hardware.logits_at_once

        def search(one: list[list[int]]) -> list[Completion]:
            return beam_search(
                self._model, one[0], sampling, samples, self._encoder.stop_ids, chunk
            )

        def failure(one: list[list[int]]) -> RunError:
            longest = len(one[0]) + sampling.max_tokens
            return oom_error("beam search", sampling.beams, longest, ["fewer algo.beams"])

        found = in_groups([[prompts[place][1]] for place in left], search, failure)
        for place, (_, hypotheses) in zip(left, found, strict=True):
            yield {place: hypotheses}


def fewer_draws(group: list[Draws]) -> list[list[Draws]]:
    """A group in two: half of its prompts each, or half of the samples of its one prompt."""
    if len(group) > 1:
        return halves(group)
    return [[Draws(group[0].place, part)] for part in halves(group[0].samples)]


def uniform_noise(seed: int, place: int, samples: int, tokens: int) -> Tensor:
    """(samples, tokens) uniform numbers that decide the draws of the prompt at `place`."""
    generator = torch.Generator().manual_seed(derived_seed(seed, place))
    return torch.rand(samples, tokens, generator=generator)
