"""Rollouts: rows of prompts and their sampled responses, the same for any batch size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Decoding, Hardware
from rlhf_cli.data.batches import cut
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.tokens import Encoder, Tokens
from rlhf_cli.models.out_of_memory import halves, in_groups, oom_error
from rlhf_cli.rollout.beam import beam_search
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.sampling import Sampling


@dataclass
class Rollout:
    """A prompt row, one response to it, and how the response came to an end."""

    row: Prompt
    tokens: Tokens
    logprobs: list[float]
    finish: str
    text: str

    @property
    def ended(self) -> bool:
        """Whether the response ended by itself rather than at max_tokens."""
        return self.finish != "length"


@dataclass
class Draws:
    """Some of the samples of the prompt at a place."""

    place: int
    samples: range


def fewer_draws(group: list[Draws]) -> list[list[Draws]]:
    """A group in two: half of its prompts each, or half of the samples of its one prompt."""
    if len(group) > 1:
        return halves(group)
    return [[Draws(group[0].place, part)] for part in halves(group[0].samples)]


def sample_rollouts(
    model: nn.Module,
    encoder: Encoder,
    prompts: list[tuple[Prompt, list[int]]],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    stop_ids: list[int],
    hardware: Hardware,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Rollout]:
    """`samples` responses to each prompt, in the order of the prompts.

    Each draw is fixed by `seed`, the prompt's place, the sample and the token, never by how
    prompts are batched. Prompts of like length are decoded together.

    Args:
        prompts: rows and their ids.
        seed: fixes all noise.
        advance: told how many responses were finished.
    """
    completions: list[list[Completion]] = [[] for _ in prompts]
    groups = cut(
        range(len(prompts)),
        hardware.rollout_tokens,
        lambda i: (len(prompts[i][1]) + sampling.max_tokens) * samples,
    )

    def draw(group: list[Draws]) -> list[Completion]:
        ids = [prompts[each.place][1] for each in group]
        noise = [
            _noise(seed, each.place, samples, sampling.max_tokens)[list(each.samples)]
            for each in group
        ]
        return decode(model, ids, torch.cat(noise), sampling, stop_ids, encoder.text)

    def failure(group: list[Draws]) -> RunError:
        return oom_error("sampling", 1, len(prompts[group[0].place][1]) + sampling.max_tokens)

    whole = [[Draws(i, range(samples)) for i in group] for group in groups]
    for group, decoded in in_groups(whole, draw, failure, fewer_draws):
        found = iter(decoded)
        for each in group:
            completions[each.place] += [next(found) for _ in each.samples]
        advance(len(decoded))
    return [
        as_rollout(row, ids, completion, encoder, sampling)
        for (row, ids), responses in zip(prompts, completions, strict=True)
        for completion in responses
    ]


def respond(
    model: nn.Module,
    encoder: Encoder,
    prompts: list[tuple[Prompt, list[int]]],
    algo: Decoding,
    *,
    seed: int,
    stop_ids: list[int],
    hardware: Hardware,
    advance: Callable[[int], None],
) -> list[Rollout]:
    """`algo.samples` responses to each prompt by the decoding that `algo` asks for."""
    sampling = Sampling.of(algo)
    if algo.beams == 1:
        return sample_rollouts(
            model,
            encoder,
            prompts,
            sampling,
            samples=algo.samples,
            seed=seed,
            stop_ids=stop_ids,
            hardware=hardware,
            advance=advance,
        )
    found = []

    def search(one: list[tuple[Prompt, list[int]]]) -> list[Completion]:
        return beam_search(model, one[0][1], algo, stop_ids, hardware.logprob_chunk)

    def failure(one: list[tuple[Prompt, list[int]]]) -> RunError:
        return oom_error(
            "beam search", algo.beams, len(one[0][1]) + algo.max_tokens, ["fewer algo.beams"]
        )

    for ((row, ids),), completions in in_groups([[each] for each in prompts], search, failure):
        found += [as_rollout(row, ids, each, encoder, sampling) for each in completions]
        advance(algo.samples)
    return found


def as_rollout(
    row: Prompt, prompt: list[int], completion: Completion, encoder: Encoder, sampling: Sampling
) -> Rollout:
    """The completion as readable text, cut before the earliest stop string."""
    text = encoder.text(completion.ids)
    if completion.finish == "stop":
        text = text[: min(text.index(string) for string in sampling.stop if string in text)]
    tokens = Tokens(prompt, completion.ids, row.source)
    return Rollout(row, tokens, completion.logprobs, completion.finish, text)


def _noise(seed: int, place: int, samples: int, tokens: int) -> Tensor:
    """(samples, tokens) uniform numbers of one prompt."""
    generator = torch.Generator().manual_seed(derived_seed(seed, place))
    return torch.rand(samples, tokens, generator=generator)
