"""The batched decoder: one pass over the prompts, then token by token; rows that end leave it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.models.decoder import unembed
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.rollout.feeding import way_of
from rlhf_cli.rollout.sampling import Chooser, Sampling, seen_in
from rlhf_cli.rollout.state import State, Way


@dataclass
class Completion:
    """One sampled response.

    ids: response ids, with the EOS if it was drawn.
    logprobs: log-prob of each id before any filter but temperature.
    finish_reason: eos, length (max_tokens reached) or stop (a stop string).
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    noise: Tensor,
    sampling: Sampling,
    stop_ids: list[int],
    text_of: Callable[[list[int]], str],
    heard: Callable[[list[int]], None] = lambda ids: None,
) -> list[Completion]:
    """Responses to prompts, K = len(noise) / len(prompts) of each, prompt by prompt.

    Args:
        prompts: ids of each prompt, at least one each.
        noise: (P * K, max_tokens) uniform numbers that decide every draw.
        stop_ids: ids that end a response.
        text_of: ids to text, for stop strings.
        heard: is told the ids of a response so far, once it has one more.
    """
    with evaluation_mode(model):
        way = way_of(model)
        if way.alone:  # each sample reads its prompt for itself
            prompts = [ids for ids in prompts for _ in range(len(noise) // len(prompts))]
        samples = noise.unflatten(0, (len(prompts), -1))  # (P, K, max_tokens)
        completions: dict[int, list[Completion]] = {}
        for places in _batches(prompts, way):
            group, drawn = [prompts[i] for i in places], samples[places].flatten(0, 1)
            found = iter(_together(model, way, group, drawn, sampling, stop_ids, text_of, heard))
            for place in places:
                completions[place] = [next(found) for _ in samples[place]]
        return [each for place in range(len(prompts)) for each in completions[place]]


def _batches(prompts: list[list[int]], way: Way) -> list[list[int]]:
    """The places of prompts that may be decoded side by side: of one length, where pads count."""
    if way.alone:
        return [[place] for place in range(len(prompts))]
    if way.padded:
        return [list(range(len(prompts)))]
    lengths = sorted({len(ids) for ids in prompts})
    return [[i for i, ids in enumerate(prompts) if len(ids) == length] for length in lengths]


def _together(
    model: nn.Module,
    way: Way,
    prompts: list[list[int]],
    noise: Tensor,
    sampling: Sampling,
    stop_ids: list[int],
    text_of: Callable[[list[int]], str],
    heard: Callable[[list[int]], None],
) -> list[Completion]:
    """`decode` in one batch, K responses to each prompt."""
    device = next(model.parameters()).device
    samples = len(noise) // len(prompts)
    width = max(map(len, prompts))
    # Left padding lets all rows grow at one column. A pad repeats the prompt's first id, so
    # that the repetition penalty sees no token that is not there; attention never sees it.
    padded = [[ids[0]] * (width - len(ids)) + ids for ids in prompts]
    real = [[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts]
    seen = torch.tensor(padded, device=device)  # (P, S)
    attention = torch.tensor(real, device=device)
    state = State(model, way)
    logits = _next_logits(model, state, seen, attention)  # (P, V)
    state.repeat(samples)
    logits, seen, attention = (x.repeat_interleave(samples, 0) for x in (logits, seen, attention))

    chooser = Chooser(sampling, stop_ids, device)
    marks = seen_in(seen, logits.shape[-1]) if chooser.penalises else None
    completions = [Completion([], [], "length") for _ in range(len(noise))]
    rows = torch.arange(len(noise))  # which completion each live row writes
    for step in range(sampling.max_tokens):
        made = torch.full((len(rows),), step, device=device)
        token, logprob, sound = chooser(logits, noise[rows, step].to(device), made, marks)
        if not sound.all():
            raise no_logits(model)
        live = torch.ones(len(rows), dtype=torch.bool)
        columns = zip(rows.tolist(), token.tolist(), logprob.tolist(), strict=True)
        for place, (row, id, value) in enumerate(columns):
            completion = completions[row]
            completion.ids.append(id)
            completion.logprobs.append(value)
            heard(completion.ids)
            if id in stop_ids:
                completion.finish_reason = "eos"
            elif any(string in text_of(completion.ids) for string in sampling.stop):
                completion.finish_reason = "stop"
            live[place] = completion.finish_reason == "length"
        if not live.any() or step + 1 == sampling.max_tokens:
            break
        seen = torch.cat([seen, token[:, None]], -1)
        if marks is not None:
            marks.scatter_(1, token[:, None], True)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], -1)
        if not live.all():
            state.select(live.nonzero()[:, 0])
            rows, seen, attention = rows[live], seen[live], attention[live]
            marks = marks[live] if marks is not None else None
        logits = _next_logits(model, state, seen, attention)
    return completions


def no_logits(model: nn.Module) -> RunError:
    """What to say where a model's logits are not finite."""
    weight = first_nonfinite(dict(model.named_parameters()))
    cause = f"its weight {weight} is not" if weight else "its activations overflow"
    return RunError(f"while sampling, the model's logits are not finite: {cause}")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing wants training mode, in which transformers keeps no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _next_logits(model: nn.Module, state: State, seen: Tensor, attention: Tensor) -> Tensor:
    """Logits of the next token, (B, V), once the state has read the columns that it lacks."""
    return unembed(model, state.read(seen, attention))
