"""From what is typed to what is kept, for every order before anybody's eyes and every tie."""

import itertools

import pytest

from rlhf_cli.labelling.answers import Wrong, canonical, comparison, dense, fault_of, ranking
from rlhf_cli.labelling.tasks import Sample, Turn, task_of


def turn(order: list[int]) -> Turn:
    samples = [Sample("p", f"r{i}", "", {"policy": "a"}) for i in range(len(order))]
    return Turn(task_of(samples), 0, order)


def weak_orders(count: int) -> list[list[int]]:
    """Every ranking of so many with ties, as dense ranks."""
    ranks = itertools.product(range(1, count + 1), repeat=count)
    return [list(each) for each in ranks if set(each) == set(range(1, max(each) + 1))]


@pytest.mark.parametrize(("count", "orders"), [(2, 3), (3, 13), (4, 75)])
def test_every_ranking_is_kept_as_meant_whatever_the_order_shown(count: int, orders: int) -> None:
    """What broke argilla for a release: the saved order was always 1, 2, 3."""
    assert len(weak_orders(count)) == orders
    for shown in itertools.permutations(range(count)):
        for meant in weak_orders(count):  # of the responses by their places in the task
            groups = [
                [str(number) for number, place in enumerate(shown, 1) if meant[place] == rank]
                for rank in range(1, max(meant) + 1)
            ]
            typed = " ".join("=".join(group) for group in groups)
            assert ranking(typed, turn(list(shown))) == meant


@pytest.mark.parametrize(
    "typed", ["1 2", "1 2 2 3", "0 1 2", "1 2 3 4", "a", "", "1=2=", "1 == 2 3"]
)
def test_what_is_no_ranking_is_refused(typed: str) -> None:
    with pytest.raises(Wrong):
        ranking(typed, turn([0, 1, 2]))


def test_ties_may_be_typed_with_blanks() -> None:
    assert ranking(" 3 =1  2\n", turn([0, 1, 2])) == [1, 2, 1]


def test_keys_of_a_pair_mirror_each_other() -> None:
    for key, other in zip("1234", "0987", strict=True):
        ours, theirs = comparison(key, turn([0, 1])), comparison(other, turn([1, 0]))
        assert ours == theirs and ours["ranks"] == [1, 2]
    assert [comparison(key, turn([0, 1]))["strength"] for key in "1234567890"] == [
        *(4, 3, 2, 1, 0, 0, 1, 2, 3, 4)
    ]
    assert (
        comparison("6", turn([0, 1]))["both_bad"] and not comparison("5", turn([0, 1]))["both_bad"]
    )


def test_ranks_of_scores_leave_no_gap() -> None:
    assert dense([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 3]
    assert canonical([1, 2, 3], [2, 0, 1]) == [2, 3, 1]


@pytest.mark.parametrize(
    ("answer", "protocol"),
    [
        ({"kind": "rank", "ranks": [1, 3]}, "rank"),
        ({"kind": "rank", "ranks": [1]}, "rank"),
        ({"kind": "rank", "ranks": [True, 2]}, "rank"),
        ({"kind": "rank", "ranks": [1, [2]]}, "rank"),
        ({"kind": "rank"}, "rank"),
        ({"kind": "pair", "ranks": [1, 2], "strength": 0}, "pair"),
        ({"kind": "pair", "ranks": [1, 1], "strength": 2}, "pair"),
        ({"kind": "pair", "ranks": [1, 2], "strength": 5}, "pair"),
        ({"kind": "pair", "ranks": [1, 2], "strength": 1, "both_bad": True}, "pair"),
        ({"kind": "pair", "ranks": [1, 1], "strength": 0, "both_bad": "yes"}, "pair"),
        ({"kind": "thumbs", "label": 1}, "thumbs"),
        ({"kind": "rank", "ranks": [1, 2]}, "pair"),
    ],
)
def test_what_a_file_says_is_looked_at(answer: dict[str, object], protocol: str) -> None:
    assert fault_of(answer, protocol, turn([0, 1]).task) is not None
