"""Ranks that share prompts make the responses of one process."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.ranks.world import world
from rlhf_cli.rollout import native
from rlhf_cli.rollout.engine import Engine
from rlhf_cli.rollout.feeding import way_of
from rlhf_cli.rollout.ranks import RankedEngine, even_runs
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import fits_slots
from rlhf_cli.runs.policy import Policy
from tests.pace import fast
from tests.ranks import on_ranks
from tests.toys import bpe, data_of, hardware_of, llama

TEXTS = ["the cat", "a", "the dog ran to the red boat and sang", "two plus two", "a song", "0 1 2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.9, "top_p": 0.8, "stop": ("a",)},
    "beams": {"beams": 3},
}
Told = tuple[list[list[Any]], list[float]]


def policy_of(**hardware: Any) -> tuple[Engine, Encoder]:
    tokenizer = bpe()
    encoder = Encoder(tokenizer, data_of())
    policy = Policy.of(llama(len(tokenizer)), encoder, hardware_of(**hardware))
    return policy.engine, encoder


def told(rollouts: list[Rollout]) -> Told:
    """All of it but log-probs, and these."""
    known = [[each.row.prompt, each.tokens.response, each.text, each.ended] for each in rollouts]
    return known, [value for each in rollouts for value in each.logprobs]


def sampled(texts: list[str], names: list[str]) -> dict[str, tuple[Told, list[int]]]:
    """By each of some options what is sampled, and what a bar was told of it."""
    engine, encoder = policy_of()
    prompts = encoder.prompts([Prompt(text) for text in texts])
    found = {}
    for name in names:
        counts: list[int] = []
        sampling = Sampling(9, **OPTIONS[name])
        drawn = engine.sample(prompts, sampling, samples=2, seed=3, advance=counts.append)
        found[name] = told(drawn), counts
    return found


@pytest.mark.parametrize("size", fast([2], [2, 3, 4]))
def test_any_number_of_ranks_writes_the_same_texts(size: int) -> None:
    alone = sampled(TEXTS, list(OPTIONS))
    assert {each[3] for (known, _), _ in alone.values() for each in known} == {True, False}
    for found in on_ranks(size, sampled, TEXTS, list(OPTIONS)):
        for name, ((known, logprobs), counts) in found.items():
            assert known == alone[name][0][0]
            assert logprobs == pytest.approx(alone[name][0][1], abs=1e-5)
            assert sum(counts) == 2 * len(TEXTS) and min(counts) >= 0


class Broken(Exception):
    pass


class Memory:
    """What `keep` was given, round by round."""

    def __init__(self, done: Mapping[int, list[Rollout]]) -> None:
        self.done: Mapping[int, list[Rollout]] = done
        self.rounds: list[list[int]] = []

    def keep(self, made: Any) -> None:
        self.rounds.append(sorted(made))
        self.done = {**self.done, **made}
        if len(self.rounds) == 2:
            raise Broken


def kept_in_rounds() -> tuple[list[list[int]], list[list[int]], Told]:
    """Ended after two rounds, and gone on from there."""
    engine, encoder = policy_of(rollout_tokens=8)
    prompts = encoder.prompts([Prompt(text) for text in TEXTS * 4])
    first = Memory({})
    with pytest.raises(Broken):
        engine.sample(prompts, Sampling(9), samples=2, seed=3, kept=first)
    second = Memory(first.done)
    second.rounds = [[], []]
    drawn = engine.sample(prompts, Sampling(9), samples=2, seed=3, kept=second)
    return first.rounds, second.rounds[2:], told(drawn)


def scored_where_one_rank_has_sampled() -> list[list[float]]:
    """A model whose samples are scored once more, by the rank that has drawn them."""
    engine, encoder = policy_of()
    model: Any = engine._model  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "fits_slots", lambda *_: False)
        patch.setattr(native, "way_of", lambda model: replace(way_of(model), exact=False))
        engine.sample(encoder.prompts([Prompt("the cat")]), Sampling(9), seed=3)
    return [each.tolist() for each in logprobs_of(model, [Tokens([5], [6, 7])], hardware_of())]


@pytest.mark.slow
def test_what_a_rank_finds_out_by_itself_keeps_none_waiting() -> None:
    first, second = on_ranks(2, scored_where_one_rank_has_sampled, seconds=30)
    assert first == second


def few_or_none() -> list[Told]:
    """Fewer prompts than ranks, of which some are done; and none at all."""
    engine, encoder = policy_of()
    (prompt,) = encoder.prompts([Prompt("the cat")])
    one = engine.sample([prompt], Sampling(9), seed=3)
    kept = Memory({1: one})
    two = engine.sample([prompt, prompt], Sampling(9), seed=3, kept=kept)
    return [told(one), told(two), told(engine.sample([], Sampling(9), seed=3))]


def failing() -> list[str]:
    """Where one rank has no memory, or no finite logits."""
    engine: Any
    engine, encoder = policy_of()
    prompts = encoder.prompts([Prompt(text) for text in TEXTS])
    last = world().rank == world().size - 1
    own = getattr(engine, "_own", engine)
    said = []
    for work in (_no_memory, None):
        if work is None and last:
            torch.nn.init.constant_(own._model.lm_head.weight, torch.nan)
        elif last:
            own._slots.draw = work
            own._in_batches = work
        try:
            engine.sample(prompts, Sampling(9), seed=3)
        except RunError as error:
            said.append(str(error))
        own.__dict__.pop("_in_batches", None)
        own._slots.__dict__.pop("draw", None)
    return said


def _no_memory(*_: Any) -> Any:
    raise RunError("out of memory in sampling")


def cases() -> list[Any]:
    return [kept_in_rounds(), few_or_none(), failing()]


@pytest.mark.slow
def test_rounds_few_prompts_and_failures_are_those_of_all_ranks() -> None:
    alone = cases()
    first, second = on_ranks(2, cases)
    assert first == second
    (before, after, drawn), few, failures = first
    places = [place for each in (*before, *after) for place in each]
    assert sorted(places) == list(range(24)) and len(after) > 1
    assert len(before) == 2 and len(before[0]) > 1
    assert drawn[0] == alone[0][2][0]
    assert [known for known, _ in few] == [known for known, _ in alone[1]]
    assert failures == alone[2] and len(failures) == 2
    assert "lm_head.weight" in failures[1]


def test_runs_of_places_need_about_as_much_as_each_other() -> None:
    assert even_runs(range(2, 6), [9, 9, 5, 5, 5, 5], 2) == [range(2, 4), range(4, 6)]
    assert even_runs(range(5), [40, 10, 10, 10, 10], 2) == [range(1), range(1, 5)]
    runs = even_runs(range(2), [3, 3], 4)
    assert [len(run) for run in runs] == [0, 1, 0, 1]
    assert even_runs(range(1), [7], 2) == [range(0), range(1)]


def in_slots(poor: int) -> bool:
    """Whether this rank goes on to sample in slots, which a rank has no memory to try."""
    engine, encoder = policy_of()
    assert isinstance(engine, RankedEngine)
    with pytest.MonkeyPatch.context() as patch:
        if world().rank == poor:
            patch.setattr("rlhf_cli.rollout.ranks.fits_slots", lambda model, reach: False)
        prompts = encoder.prompts([Prompt(text) for text in TEXTS])
        engine.sample(prompts, Sampling(3, temperature=0.0), seed=0)
    return fits_slots(engine._model, 20)


@pytest.mark.slow
def test_all_ranks_sample_in_slots_or_none() -> None:
    assert on_ranks(2, in_slots, 9) == [True, True]
    assert on_ranks(2, in_slots, 1)[0] is False
