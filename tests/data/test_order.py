"""Orders, draws and batches, fixed by the seed."""

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.batches import EpochBatches, draw
from rlhf_cli.data.order import derived_seed, evenly, order_of


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 3))
def test_an_order_is_a_permutation_fixed_by_its_names(count: int, seed: int, epoch: int) -> None:
    places = order_of(count, seed, "x", epoch)
    assert sorted(places) == list(range(count))
    assert places == order_of(count, seed, "x", epoch)


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
    batches = list(EpochBatches("abcde", 2, 3, seed=0, name="x"))
    assert [len(batch) for batch in batches] == [2, 2, 1] * 3
    for epoch in range(3):
        joined = sum(batches[3 * epoch : 3 * epoch + 3], [])
        assert sorted(joined) == list("abcde")
    assert batches[:3] != batches[3:6]


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 3))
def test_a_batch_of_any_step_is_that_of_the_seeded_order(
    count: int, size: int, epochs: int
) -> None:
    batches = EpochBatches(range(count), size, epochs, seed=4, name="x")
    orders = [order_of(count, 4, "x", epoch) for epoch in range(epochs)]
    expected = [
        places[start : start + size] for places in orders for start in range(0, count, size)
    ]
    assert len(batches) == len(expected)
    assert list(batches) == expected
    assert [batches[step] for step in reversed(range(len(expected)))] == expected[::-1]
    with pytest.raises(IndexError):
        batches[len(expected)]


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(count: int, seed: int, name: str, epoch: int) -> list[int]:
        made.append(epoch)
        return order_of(count, seed, name, epoch)

    monkeypatch.setattr("rlhf_cli.data.mixing.order_of", counted)
    batches = EpochBatches(range(5), 2, 3, seed=0, name="x")
    assert len(batches) == 9 and not made
    for step in range(4, 9):
        batches[step]
    assert made == [1, 2]


def test_draws_shuffle_an_epoch_once_however_streams_alternate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def counted(count: int, seed: int, name: str, epoch: int) -> list[int]:
        made.append((name, epoch))
        return order_of(count, seed, name, epoch)

    monkeypatch.setattr("rlhf_cli.data.mixing.order_of", counted)
    names = ["prompts", "refill 1", "refill 2", "ptx"]
    for step in range(7):  # 21 of 10 items: two epochs, and the first of the third
        for name in names:
            epoch, start = divmod(3 * step, 10)
            order = order_of(10, 9, name, epoch) + order_of(10, 9, name, epoch + 1)
            expected = order[start : start + 3]
            assert draw(range(10), 3, 9, name, step) == expected
    assert sorted(made) == sorted((name, epoch) for name in names for epoch in (0, 1, 2))
    assert draw(range(11), 3, 9, "ptx", 0) != draw(range(10), 3, 9, "ptx", 0)


def test_a_step_of_a_million_prompts_takes_no_second() -> None:
    prompts = range(1_000_000)
    draw(prompts, 16, 5, "prompts", 0)
    began = time.process_time()
    draw(prompts, 16, 5, "prompts", 1)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [3, 3, 3]), (5, 4, [2, 3]), (3, 4, [3]), (0, 4, []), (7, 1, [1] * 7)],
)
def test_parts_are_near_equal_and_in_order(count: int, size: int, sizes: list[int]) -> None:
    parts = evenly(list(range(count)), size)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == list(range(count))
