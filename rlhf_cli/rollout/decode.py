"""The batched decoder: one prefill per prompt, a key-value cache, finished rows leave the batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_cli.config.errors import RunError
from rlhf_cli.models.decoder import matmul_type, trunk, unembed, unwrap
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.rollout.sampling import Sampling, choose, filter_logits


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
) -> list[Completion]:
    """Responses to prompts, K = len(noise) / len(prompts) of each, prompt by prompt.

    Args:
        prompts: ids of each prompt, at least one each.
        noise: (P * K, max_tokens) uniform numbers that decide every draw.
        stop_ids: ids that end a response.
        text_of: ids to text, for stop strings.
    """
    with evaluation_mode(model):
        device = next(model.parameters()).device
        samples = len(noise) // len(prompts)
        width = max(map(len, prompts))
        # Left padding lets all rows grow at one column. A pad repeats the prompt's first id, so
        # that the repetition penalty sees no token that is not there; attention never sees it.
        padded = [[ids[0]] * (width - len(ids)) + ids for ids in prompts]
        real = [[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts]
        seen = torch.tensor(padded, device=device)  # (P, S)
        attention = torch.tensor(real, device=device)
        cache = DynamicCache(config=unwrap(model).config)
        logits = _next_logits(model, seen, attention, cache)  # (P, V)
        cache.batch_repeat_interleave(samples)
        logits, seen, attention = (
            x.repeat_interleave(samples, 0) for x in (logits, seen, attention)
        )

        completions = [Completion([], [], "length") for _ in range(len(noise))]
        rows = torch.arange(len(noise))  # which completion each live row writes
        for step in range(sampling.max_tokens):
            filtered = filter_logits(logits, seen, step, sampling, stop_ids)
            if not filtered.amax(-1).isfinite().all():  # the largest is a NaN where any is
                raise no_logits(model)
            token = choose(filtered, noise[rows, step].to(device), sampling.temperature == 0)
            logprob = torch.log_softmax(logits / sampling.scored_at, -1).gather(-1, token[:, None])
            live = torch.ones(len(rows), dtype=torch.bool)
            columns = zip(rows.tolist(), token.tolist(), logprob[:, 0].tolist(), strict=True)
            for place, (row, id, value) in enumerate(columns):
                completion = completions[row]
                completion.ids.append(id)
                completion.logprobs.append(value)
                if id in stop_ids:
                    completion.finish_reason = "eos"
                elif any(string in text_of(completion.ids) for string in sampling.stop):
                    completion.finish_reason = "stop"
                live[place] = completion.finish_reason == "length"
            if not live.any() or step + 1 == sampling.max_tokens:
                break
            seen = torch.cat([seen, token[:, None]], -1)
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], -1)
            if not live.all():
                cache.batch_select_indices(live.nonzero()[:, 0].to(device))
                rows, seen, attention = rows[live], seen[live], attention[live]
            logits = _next_logits(model, seen, attention, cache)
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


def _next_logits(model: nn.Module, seen: Tensor, attention: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the next token, (B, V); the cache takes in the columns that it lacks."""
    past = cache.get_seq_length()
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    with matmul_type(model):
        hidden = trunk(model)(
            input_ids=seen[:, past:],
            attention_mask=attention.long(),
            position_ids=positions[:, past:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return unembed(model, hidden[:, -1])
