"""Memory that runs out changes nothing but time, until one item does not fit either."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Answers
from rlhf_cli.data.kinds import Feedback, Ranking
from rlhf_cli.models import score
from rlhf_cli.models.out_of_memory import (
    halves,
    if_it_fits,
    in_groups,
    keys_that_help,
    oom_error,
    ran_out,
)
from tests.toys import hardware_of, llama, sequences_of

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error, out",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError(CPU), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, out: bool) -> None:
    assert ran_out(error) == out

    def work() -> int:
        raise error

    if out:
        assert if_it_fits(work) is None
    else:
        with pytest.raises(type(error)):
            if_it_fits(work)


def test_what_the_failed_work_held_is_free_again() -> None:
    held: list[Any] = []

    def work() -> int:
        tensor = torch.zeros(9)
        held.append(weakref.ref(tensor))
        raise MemoryError

    assert if_it_fits(work) is None
    assert held[0]() is None


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), max_size=5), room=st.integers(1, 9))
@pytest.mark.slow
def test_every_item_once_in_order_in_groups_that_fit(sizes: list[int], room: int) -> None:
    places = iter(range(sum(sizes)))
    groups = [[next(places) for _ in range(size)] for size in sizes]
    seen: list[int] = []

    def work(group: list[int]) -> int:
        if len(group) > room:
            raise MemoryError
        return len(group)

    for group, found in in_groups(groups, work, lambda group: RunError("never")):
        assert found == len(group) <= room
        seen += group
    assert seen == list(range(sum(sizes)))


def test_a_group_of_one_that_does_not_fit_ends_the_run() -> None:
    def work(group: list[int]) -> int:
        raise MemoryError

    with pytest.raises(RunError, match="^item 5$"):
        list(in_groups([[5, 6, 7]], work, lambda group: RunError(f"item {group[0]}")))


def test_halves_of_an_odd_group() -> None:
    assert halves([1, 2, 3]) == [[1], [2, 3]]
    assert halves([1]) == [[1]]


def test_only_keys_that_act_and_are_not_at_their_least_are_named() -> None:
    hardware = hardware_of(logprob_chunk=64, gradient_checkpointing=False)
    both = keys_that_help(hardware, 999, logits=True, gradient=True)
    assert both == ["hardware.logprob_chunk=32", "hardware.gradient_checkpointing=true"]
    assert keys_that_help(hardware, 20, logits=True) == ["hardware.logprob_chunk=10"]
    assert keys_that_help(hardware, 20, logits=False) == []
    least = hardware_of(logprob_chunk=1, gradient_checkpointing=True)
    assert keys_that_help(least, 20, logits=True, gradient=True) == []


def test_the_line_says_phase_arithmetic_and_keys() -> None:
    line = str(oom_error("the update", 2, 512, ["hardware.logprob_chunk=32"]))
    assert line == (
        "out of memory in the update, with as little at once as can be: 2 sequences x 512 = 1024 "
        "padded tokens; what helps: hardware.logprob_chunk=32, shorter data.max_prompt_tokens and "
        "max_response_tokens, a smaller model"
    )


# --------------------------------------------------------------------------- scoring


def small_memory(model: nn.Module, most: int) -> list[int]:
    """The model's trunk fails on more than `most` padded tokens; returns the sizes that it ran."""
    sizes: list[int] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        size = kwargs["input_ids"].numel()
        if size > most:
            raise RuntimeError(CPU)
        sizes.append(size)

    model.get_submodule("model").register_forward_pre_hook(look, with_kwargs=True)
    return sizes


GROUPS = [
    Answers([1, 4, 5], [[6, 7, 2], [8, 2]], Ranking("p", ["a", "b"], [1, 2], "rows.jsonl:1")),
    Answers([1, 9], [[6, 2]], Feedback("p", "a", True, source="rows.jsonl:2")),
    Answers([1, 9, 9, 3], [[2], [5, 6, 7, 2]], Ranking("p", ["a", "b"], [1, 2], "rows.jsonl:3")),
]


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(ours), list(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [16, 40])
def test_scores_do_not_change_where_less_fits_at_once(most: int) -> None:
    model, hardware = llama(), hardware_of(tokens_per_microbatch=999)
    sequences = sequences_of(9)
    whole = score.logprobs_of(model, sequences, hardware)
    told: list[int] = []
    answers = score.logprobs_of(model, GROUPS, hardware, advance=told.append)
    sizes = small_memory(model, most)
    close(score.logprobs_of(model, sequences, hardware), whole)
    told_again: list[int] = []
    again = score.logprobs_of(model, GROUPS, hardware, advance=told_again.append)
    close(again, answers)
    assert sum(told) == sum(told_again) == len(GROUPS)
    assert max(sizes) <= most and len(sizes) > 2


def test_a_sequence_that_does_not_fit_ends_scoring_in_one_line() -> None:
    model, hardware = llama(), hardware_of(tokens_per_microbatch=999, logprob_chunk=4)
    longest = max(map(len, sequences_of(9)))
    small_memory(model, longest - 1)
    line = f"out of memory in scoring.*: 1 sequence x {longest} = .*logprob_chunk=2, shorter"
    with pytest.raises(RunError, match=line):
        score.logprobs_of(model, sequences_of(9), hardware)
    with pytest.raises(RunError, match="scoring.*: 2 sequences x 8 = 16 padded"):
        small_memory(model, 6)
        score.logprobs_of(model, GROUPS, hardware)
