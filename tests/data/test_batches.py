"""Padding, budgets and orders."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batches import (
    collate,
    collate_answers,
    cut,
    derived_seed,
    draw,
    epochs_of,
    evenly,
    order_of,
    sharing_pays,
)
from rlhf_cli.data.tokens import Answers, Tokens

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def test_a_worked_collate() -> None:
    batch = collate([Tokens([1, 2], [3]), Tokens([1], [4, 5, 6]), Tokens([], [7, 8])])
    assert batch.ids.tolist() == [[1, 2, 3, 0], [1, 4, 5, 6], [7, 8, 0, 0]]
    assert batch.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    # nothing predicts a first token
    assert batch.response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 1, 1]]
    assert len(batch) == 3


def test_a_worked_collate_of_answers_apart() -> None:
    batch = collate_answers([Answers([1, 2], [[3], [4, 5]], "row"), Answers([6], [[7, 8]], "row")])
    assert batch.ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 8, 0]]
    assert batch.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.response.int().tolist() == [[1, 0], [1, 1], [1, 1]]
    assert batch.at.tolist() == [[2, 2], [6, 7], [9, 10]]
    assert batch.before[batch.response].tolist() == [1, 5, 6, 8, 9]
    assert len(batch) == 3


def test_a_worked_collate_of_answers_that_share_their_prompt() -> None:
    groups = [Answers([1, 2], [[3], [4, 5]], "row"), Answers([6], [[7, 8]], "row")]
    batch = collate_answers(groups, share=True)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert batch.attention.shape == (2, 1, 5, 5)
    assert batch.attention[:, 0].int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        # the last two are pads: nothing sees them but themselves
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]],
    ]
    assert batch.response.int().tolist() == [[1, 0], [1, 1], [1, 1]]
    assert batch.at.tolist() == [[2, 2], [3, 4], [6, 7]]
    assert batch.before[batch.response].tolist() == [1, 1, 3, 5, 6]
    assert len(batch) == 3


def test_without_a_prompt_nothing_is_shared_and_first_tokens_are_not_predicted() -> None:
    groups = [Answers([], [[3], [4, 5]], "row"), Answers([1, 2], [[6], [7]], "row")]
    batch = collate_answers(groups, share=True)
    assert batch.ids.tolist() == [[3, 0, 0, 0], [4, 5, 0, 0], [1, 2, 6, 7]]
    assert batch.response.int().tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]
    assert batch.at[:, -1].tolist() == [0, 5, 10, 11]
    assert batch.before[batch.response].tolist() == [4, 9, 9]
    assert batch.attention.any(-1).all()
    apart = collate_answers(groups)
    assert torch.equal(apart.response, batch.response)
    pairs = [each for group in groups for each in group.sequences]
    assert torch.equal(apart.attention, collate(pairs).attention)


def answers(prompt: int, *responses: int) -> Answers:
    """A group of these lengths."""
    return Answers([1] * prompt, [[2] * length for length in responses], "row")


def test_sharing_pays_where_prompts_are_long() -> None:
    assert sharing_pays([answers(30, 10, 10)], width=512)
    assert sharing_pays([answers(30, 10, 10), answers(28, 5, 9)], width=512)
    assert not sharing_pays([answers(30, 10)], width=512)
    assert not sharing_pays([answers(0, 10, 10)], width=512)
    # its many responses make a long row, to which the others are padded
    assert not sharing_pays([answers(10, *[10] * 8), answers(10, 10), answers(10, 10)], 512)


def test_sharing_pays_less_where_attention_weighs_more() -> None:
    """Shared 320 tokens and 320^2 pairs, apart 4 x 128 and 4 x 128^2."""
    ranking = [answers(64, 64, 64, 64, 64)]
    assert sharing_pays(ranking, width=768)
    assert not sharing_pays(ranking, width=32)


GROUPS = st.builds(
    answers, st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)
) | st.builds(answers, st.integers(0, 20), st.integers(1, 20))


@given(st.lists(GROUPS, max_size=30), st.integers(1, 300))
def test_a_cut_of_groups_keeps_its_budget_in_either_layout(
    groups: list[Answers], budget: int
) -> None:
    batches = cut(groups, budget, count=lambda group: len(group.responses))
    assert sorted(map(id, groups)) == sorted(id(group) for batch in batches for group in batch)
    for batch in batches:
        padded = collate_answers(batch).ids.numel()
        assert padded <= budget or len(batch) == 1
        if sharing_pays(batch, width=512):
            assert collate_answers(batch, share=True).ids.numel() < padded


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_a_cut_covers_everything_once_within_its_budget(lengths: list[int], budget: int) -> None:
    items = [(place, length) for place, length in enumerate(lengths)]
    groups = cut(items, budget, lambda item: item[1])
    assert sorted(item for group in groups for item in group) == items
    for group in groups:
        padded = len(group) * max(length for _, length in group)
        assert padded <= budget or len(group) == 1
    joined = [item[1] for group in groups for item in group]
    assert joined == sorted(joined, reverse=True)  # the largest first: memory fails early


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3))
def test_an_order_is_a_permutation_fixed_by_its_names(count: int, seed: int, epoch: int) -> None:
    order = order_of(count, seed, "x", epoch)
    assert sorted(order) == list(range(count))
    assert order == order_of(count, seed, "x", epoch)


def test_orders_differ_by_seed_name_and_epoch() -> None:
    orders = {
        tuple(order_of(30, seed, name, epoch))
        for seed in (0, 1)
        for name in ("sft", "ptx")
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    assert derived_seed(0, "a", 1) != derived_seed(0, "a1") != derived_seed(1, "a", 1)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12))
def test_draws_run_through_the_items_epoch_by_epoch(items: int, count: int, steps: int) -> None:
    stream = [item for step in range(steps) for item in draw(range(items), count, 3, "x", step)]
    for start in range(0, len(stream) - items + 1, items):
        assert sorted(stream[start : start + items]) == list(range(items))
    seen = Counter(stream)
    assert max(seen.values()) - min(seen.get(item, 0) for item in range(items)) <= 1


def test_epochs_have_every_item_once() -> None:
    batches = list(epochs_of("abcde", 2, 3, seed=0, name="x"))
    assert [len(batch) for batch in batches] == [2, 2, 1] * 3
    for epoch in range(3):
        joined = sum(batches[3 * epoch : 3 * epoch + 3], [])
        assert sorted(joined) == list("abcde")
    assert batches[:3] != batches[3:6]


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [3, 3, 3]), (5, 4, [2, 3]), (3, 4, [3]), (0, 4, []), (7, 1, [1] * 7)],
)
def test_parts_are_near_equal_and_in_order(count: int, size: int, sizes: list[int]) -> None:
    parts = evenly(list(range(count)), size)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == list(range(count))
