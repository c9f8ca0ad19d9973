"""Do all ranks hold the same weights? They drift apart where one starts from others, or computes
otherwise, and nothing else would show it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.models.shards import is_sharded, own_part, rows_of
from rlhf_cli.ranks.world import world

AT_ONCE = 2**22  # numbers of a weight
WORD = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def require_same(weights: Mapping[str, Tensor], when: str) -> None:
    """Stop where two ranks hold the same rows of a weight with other values.

    Args:
        weights: by name, the same names on each rank.

    Raises:
        RunError: on all ranks, naming the first such weight and the ranks.
    """
    if world().size == 1:
        return
    own = [[*_place(weight), checksum(own_part(weight))] for weight in weights.values()]
    rows = torch.stack(world().gather([torch.tensor(own, dtype=torch.int64).flatten()]))
    table = rows.view(world().size, len(own), 3).unbind(1)  # of each weight (ranks, 3)
    for name, held in zip(weights, table, strict=True):
        for rank, (first, count, value) in enumerate(held.tolist()):
            others = (held[:, 0] == first) & (held[:, 1] == count) & (held[:, 2] != value)
            if others.any():
                raise RunError(
                    f"ranks {rank} and {int(others.nonzero()[0])} hold different weights {when}, "
                    f"{name} first: they must start from the same seed and files, and run the same "
                    "versions on the same kind of device"
                )


def _place(weight: Tensor) -> tuple[int, int]:
    """Which rows of a weight this rank holds."""
    return rows_of(weight) if is_sharded(weight) else (0, -1)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A sum of a tensor's bits, each word times an odd number of its own, modulo 2^64."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(WORD[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), AT_ONCE):
        some = words[start : start + AT_ONCE].long()
        odd = torch.arange(start, start + len(some), device=some.device) * 2 + 1
        total += (some * odd).sum()
    return int(total)
