"""Beam search finds what enumeration finds."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout.beam import beam_search
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.sampling import Sampling
from tests.toys import composed, hardware_of, llama

SYMBOLS, LENGTH, PROMPT = 5, 3, [1, 3]


def search(model: Any, beams: int, **options: Any) -> list[Completion]:
    settings = {"max_tokens": LENGTH, "min_tokens": 0, "samples": 1, "length_penalty": 1.0}
    settings["repetition_penalty"] = 1.0
    algo = replace(composed("generate").algo, beams=beams, **settings | options)
    return beam_search(model, PROMPT, Sampling.of(algo), algo.samples, [SYMBOLS - 1], 64)


def logprob(model: Any, response: tuple[int, ...]) -> float:
    return logprobs_of(model, [Tokens(PROMPT, list(response))], hardware_of())[0].sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_likeliest_of_all(seed: int) -> None:
    """Without an EOS every response has three tokens; 16 beams hold every prefix of two."""
    model = llama(SYMBOLS, seed=seed)
    ids = range(SYMBOLS - 1)
    scores = {each: logprob(model, each) for each in itertools.product(ids, repeat=LENGTH)}
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    found = search(model, 16, min_tokens=LENGTH, samples=4)
    assert [tuple(each.ids) for each in found] == ranked[:4]
    for each in found:
        assert sum(each.logprobs) == pytest.approx(scores[tuple(each.ids)], abs=1e-5)
        assert each.finish_reason == "length"
    noise = torch.zeros(1, LENGTH)
    sampling = Sampling(LENGTH, 0.0, min_tokens=LENGTH)
    greedy = decode(model, [PROMPT], noise, sampling, [SYMBOLS - 1], str)[0]
    assert logprob(model, tuple(greedy.ids)) <= scores[ranked[0]] + 1e-5


def test_hypotheses_are_ranked_by_length_normalised_log_prob() -> None:
    """Every response that ends within three tokens, or runs into the limit, by enumeration."""
    model = llama(SYMBOLS, seed=4)
    eos = SYMBOLS - 1
    ended = {
        (*prefix, eos)
        for length in range(LENGTH)
        for prefix in itertools.product(range(eos), repeat=length)
    }
    cut = set(itertools.product(range(eos), repeat=LENGTH))
    for penalty in (0.0, 1.0, 2.0):
        scores = {each: logprob(model, each) / len(each) ** penalty for each in ended | cut}
        best = max(scores, key=scores.__getitem__)
        (found,) = search(model, 30, length_penalty=penalty)
        assert tuple(found.ids) == best
        assert found.finish_reason == ("eos" if best in ended else "length")


def test_one_beam_is_greedy() -> None:
    for seed in range(4):
        model = llama(SYMBOLS, seed=seed)
        noise = torch.zeros(1, LENGTH)
        greedy = decode(model, [PROMPT], noise, Sampling(LENGTH, 0.0), [SYMBOLS - 1], str)[0]
        (found,) = search(model, 1)
        assert found.ids == greedy.ids
        assert found.finish_reason == greedy.finish_reason
        assert found.logprobs == pytest.approx(greedy.logprobs, abs=1e-5)


def test_a_model_of_bad_weights_ends_the_search() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="logits are not finite: its weight lm_head.weight"):
        beam_search(model, [1, 5], Sampling(9, beams=2), 1, [2], 9)
