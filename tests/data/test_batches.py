"""Layouts and budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batches import collate, collate_answers, cut, micro_batches
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.packing import PACKED, PADDED, SHARED, SHARED_FROM, Layout


def test_a_worked_collate() -> None:
    batch = collate([Tokens([1, 2], [3]), Tokens([1], [4, 5, 6]), Tokens([], [7, 8])])
    assert batch.ids.tolist() == [[1, 2, 3, 0], [1, 4, 5, 6], [7, 8, 0, 0]]
    assert batch.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    # nothing predicts a first token
    assert batch.response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 1, 1]]
    assert batch.at.tolist() == [[0, 1, 2, 2], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert batch.before[batch.response].tolist() == [1, 4, 5, 6, 8]
    assert len(batch) == 3


def test_a_worked_collate_of_answers_apart() -> None:
    batch = collate_answers([Answers([1, 2], [[3], [4, 5]], "row"), Answers([6], [[7, 8]], "row")])
    assert batch.ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 8, 0]]
    assert batch.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 2, 2]]
    assert batch.response.int().tolist() == [[1, 0], [1, 1], [1, 1]]
    assert batch.at.tolist() == [[2, 2], [6, 7], [9, 10]]
    assert batch.before[batch.response].tolist() == [1, 5, 6, 8, 9]
    assert len(batch) == 3


def test_a_worked_packed_collate() -> None:
    batch = collate(
        [Tokens([1, 2], [3]), Tokens([1], [4, 5, 6]), Tokens([], [7, 8])], "cpu", PACKED
    )
    assert batch.ids.tolist() == [[1, 2, 3, 1, 4, 5, 6, 7, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch.attention.all() and (batch.stands_for == 1).all()
    assert batch.response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert batch.at.tolist() == [[0, 1, 2, 2], [3, 4, 5, 6], [7, 8, 8, 8]]
    assert batch.before.flatten()[batch.scored].tolist() == [1, 3, 4, 5, 7]
    assert batch.packing is not None and batch.packing.keys is None
    assert list(batch.packing.lengths) == [3, 4, 2]
    assert batch.packing.starts.tolist() == [0, 3, 7, 9]


def test_a_worked_collate_of_answers_that_share_their_prompt() -> None:
    prompt = list(range(1, SHARED_FROM + 1))  # the last is n
    n = SHARED_FROM
    groups = [Answers(prompt, [[90], [91, 92]], "row"), Answers([6], [[93, 94], [95]], "row")]
    batch = collate_answers(groups, layout=SHARED)
    assert batch.ids.tolist() == [[*prompt, 90, 91, 92, 6, 93, 94, 6, 95]]
    assert batch.positions.tolist() == [[*range(n), n, n, n + 1, 0, 1, 2, 0, 1]]
    assert batch.stands_for.tolist() == [[2] * n + [1] * 8]
    assert batch.response.int().tolist() == [[1, 0], [1, 1], [1, 1], [1, 0]]
    assert batch.at.tolist() == [[n, n], [n + 1, n + 2], [n + 4, n + 5], [n + 7, n + 7]]
    assert batch.before.flatten()[batch.scored].tolist() == [
        n - 1,
        n - 1,
        n + 1,
        n + 3,
        n + 4,
        n + 6,
    ]
    packing = batch.packing
    assert packing is not None and packing.keys is not None
    assert list(packing.lengths) == [n, 1, 2, 3, 2]
    assert list(packing.key_lengths) == [n, n + 1, n + 2, 3, 2]
    seen = [*range(n), *range(n), n, *range(n), n + 1, n + 2, *range(n + 3, n + 8)]
    assert packing.keys.tolist() == seen
    apart = collate_answers(groups, layout=PACKED)
    assert torch.equal(apart.response, batch.response) and apart.ids.numel() == 2 * n + 8


def test_whole_sequences_share_prompts_wherever_they_stand() -> None:
    prompt = list(range(1, SHARED_FROM + 1))
    rows = [Tokens(prompt, [90]), Tokens([7], [91]), Tokens(prompt, [92, 93], loss=[False, True])]
    batch = collate(rows, layout=SHARED)
    assert batch.ids.tolist() == [[*prompt, 90, 92, 93, 7, 91]]
    found = batch.ids.flatten()[batch.at]
    for row, tokens in zip(found.tolist(), rows, strict=True):
        assert row[: len(tokens)] == tokens.prompt + tokens.response
    assert batch.ids.flatten()[batch.at.flatten()[batch.scored]].tolist() == [90, 91, 93]


def test_without_a_prompt_first_tokens_are_not_predicted() -> None:
    groups = [Answers([], [[3], [4, 5]], "row"), Answers([1, 2], [[6], [7]], "row")]
    for layout in (PADDED, PACKED, SHARED):
        batch = collate_answers(groups, layout=layout)
        assert batch.response.int().tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]
        ids = batch.ids.flatten()
        assert ids[batch.at[:, -1]].tolist() == [3, 5, 6, 7]
        assert ids[batch.before.flatten()[batch.scored]].tolist() == [4, 2, 2]


def answers(prompt: int, *responses: int) -> Answers:
    """A group of these lengths."""
    return Answers([1] * prompt, [[2] * length for length in responses], "row")


GROUPS = st.builds(
    answers, st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)
) | st.builds(answers, st.integers(0, 20), st.integers(1, 20))


@settings(max_examples=25)
@given(st.lists(GROUPS, max_size=20), st.integers(1, 300))
@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED])
def test_a_cut_of_groups_keeps_its_budget(
    layout: Layout, groups: list[Answers], budget: int
) -> None:
    batches = micro_batches(groups, budget, layout)
    assert sorted(map(id, groups)) == sorted(id(group) for batch in batches for group in batch)
    sizes = [collate_answers(batch, layout=layout).ids.numel() for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= budget or len(batch) == 1
    if layout.packed:  # the largest first: memory fails early
        assert sizes == sorted(sizes, reverse=True)


def test_packed_groups_are_about_equal_and_keep_a_prompt_together() -> None:
    rows = [Tokens([p] * SHARED_FROM, [9] * (1 + r)) for r in range(8) for p in range(4)]
    budget = 2 * (SHARED_FROM + 36)  # two prompts with eight responses each
    found = micro_batches(rows, budget, SHARED)
    assert [len({each.prompt[0] for each in batch}) for batch in found] == [2, 2]
    assert len(micro_batches(rows, budget, PACKED)) > 2
    sizes = [sum(map(len, batch)) for batch in micro_batches(rows, 200, PACKED)]
    assert max(sizes) - min(sizes) <= SHARED_FROM + 8


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
