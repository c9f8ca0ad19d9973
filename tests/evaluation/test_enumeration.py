"""Responses that are enumerated, against all that there are."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_cli.data.items import Tokens
from rlhf_cli.evaluation.enumeration import enumerated
from rlhf_cli.models.score import logprobs_of
from tests.objectives.spaces import drawn
from tests.toys import bigram, composed, hardware_of

END, LENGTH = 0, 3


def policy_of_four() -> Any:
    """A model of four tokens, of which the first ends a response; the last stands for none."""
    vocabulary = SimpleNamespace(get_vocab=lambda: {str(id): id for id in range(4)})
    model = bigram(drawn(5, 5, seed=1).float())
    return SimpleNamespace(
        model=model, encoder=SimpleNamespace(tokenizer=vocabulary), stop_ids=[END]
    )


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_all_responses_are_found_with_their_probabilities(tokens: int) -> None:
    policy = policy_of_four()
    cfg = SimpleNamespace(
        algo=SimpleNamespace(enumerate=1000, sampled_tokens=LENGTH, temperature=0.7),
        hardware=hardware_of(tokens_per_microbatch=str(tokens)),
    )
    found = enumerated(policy, [1, 2], cfg)  # type: ignore[arg-type]
    whole = [
        list(ids)
        for length in range(1, LENGTH + 1)
        for ids in itertools.product(range(4), repeat=length)
        if END not in ids[:-1] and (ids[-1] == END or length == LENGTH)
    ]
    assert sorted(found.ids) == sorted(whole) and len(whole) == 40
    sequences = [Tokens([1, 2], ids) for ids in found.ids]
    scored = logprobs_of(policy.model, sequences, composed("ppo").hardware, 0.7)
    assert found.logprobs.tolist() == pytest.approx(
        [each.sum().item() for each in scored], abs=1e-5
    )
    assert found.logprobs.tolist() == sorted(found.logprobs.tolist(), reverse=True)
    cfg.algo.enumerate = 12
    some = enumerated(policy, [1, 2], cfg)  # type: ignore[arg-type]
    assert len(some.ids) == 12 and some.ids[0] == found.ids[0]
    assert 0.5 < some.logprobs.exp().sum() < found.logprobs.exp().sum() < 1  # the fifth is left out
    torch.testing.assert_close(
        some.logprobs, torch.stack([found.logprobs[found.ids.index(ids)] for ids in some.ids])
    )
