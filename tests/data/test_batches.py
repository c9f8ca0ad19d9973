"""Padding and budgets."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batches import Batch, collate, collate_answers, cut, sharing_pays
from rlhf_cli.data.items import Answers, Tokens

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


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


def test_whole_sequences_may_be_padded_on_either_side() -> None:
    ids = torch.tensor([[0, 0, 1, 2], [0, 3, 4, 0]])
    response = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    batch = Batch.of_sequences(ids, ids > 0, response)
    assert batch.positions.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch.at.tolist() == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert batch.before[response].tolist() == [2, 5]


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
