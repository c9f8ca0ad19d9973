"""Beam search, by transformers' own generate."""

import math

import torch
from torch import nn

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.rollout.decode import Completion, evaluation_mode, no_logits
from rlhf_cli.rollout.feeding import reorders
from rlhf_cli.rollout.sampling import Sampling


@torch.no_grad()
def beam_search(
    model: nn.Module,
    prompt: list[int],
    sampling: Sampling,
    samples: int,
    stop_ids: list[int],
    chunk: int,
) -> list[Completion]:
    """The `samples` best of `sampling.beams` hypotheses, best first.

    A hypothesis is ranked by log-prob / length ** length_penalty; its log-probs are the model's.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    with evaluation_mode(model):
        carried = reorders(model)
    output = unwrap(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=sampling.beams,
        num_return_sequences=samples,
        length_penalty=sampling.length_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_new_tokens=sampling.min_tokens or None,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=stop_ids,
        use_cache=carried,  # a state that beams cannot exchange would be another beam's
        suppress_tokens=list(sampling.absent) or None,
        pad_token_id=stop_ids[0],  # what follows the end of a hypothesis is cut off below
    )
    completions = []
    for row in output[:, len(prompt) :].tolist():
        end = next((i + 1 for i, id in enumerate(row) if id in stop_ids), None)
        response = row[:end]
        tokens = Tokens(prompt, response)
        logprobs = _logprobs(model, tokens, chunk)
        if not all(map(math.isfinite, logprobs)):
            raise no_logits(model)
        completions.append(Completion(response, logprobs, "length" if end is None else "eos"))
    return completions


def _logprobs(model: nn.Module, tokens: Tokens, chunk: int) -> list[float]:
    batch = collate([tokens], next(model.parameters()).device)
    grid = token_logprobs(model, batch, chunk=chunk).logprobs
    values: list[float] = grid[batch.response].tolist()
    return values
