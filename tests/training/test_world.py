"""What ranks do together: sums, gathered rows, agreement."""

from typing import Any

import torch

from rlhf_cli.ranks.world import World, alone, world
from tests.ranks import on_ranks


def collectives() -> dict[str, Any]:
    own = world()
    sums = [torch.full((3,), own.rank + 1.0), torch.arange(4.0).view(2, 2)]
    own.sum(sums)
    with alone():
        inner = world().size
    return {
        "sums": [each.tolist() for each in sums],
        "rows": [
            row.tolist()
            for row in own.gather([torch.arange(n + own.rank).double() for n in range(own.rank)])
        ],
        "grids": [grid.tolist() for grid in own.gather([torch.full((2, 3), own.rank)])],
        "nothing": own.gather([]),
        "any": [own.any(own.rank == 1), own.any(False)],
        "all": [own.all(own.rank == 1), own.all(True)],
        "from_main": own.from_main({"rank": own.rank}),
        "alone": inner,
    }


def test_all_ranks_come_to_the_same() -> None:
    first, second = on_ranks(2, collectives)
    assert first == second
    assert first == {
        "sums": [[3.0, 3.0, 3.0], [[0.0, 2.0], [4.0, 6.0]]],
        "rows": [[0.0]],
        "grids": [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]],
        "nothing": [],
        "any": [True, False],
        "all": [False, True],
        "from_main": {"rank": 0},
        "alone": 1,
    }


def test_shares_are_even_and_in_order() -> None:
    own = World()
    own.size = 4
    shares = []
    for own.rank in range(4):
        shares.append(list(own.share(6)))
    assert shares == [[0], [1, 2], [3], [4, 5]]
    assert list(World().share(6)) == list(range(6))
