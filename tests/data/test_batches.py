"""Padding, budgets and orders."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batches import collate, cut, derived_seed, draw, epochs_of, order_of
from rlhf_cli.data.tokens import Tokens

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
