"""Figures of a step wait for the device once, and sum as they did one by one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.training import figures
from rlhf_cli.training.figures import Figures
from rlhf_cli.training.loss_term import Loss, LossTerm
from tests.training.test_optimize import optimizer_of
from tests.waits import Waits


def test_parts_of_any_type_add_up_in_their_order() -> None:
    sums = Figures()
    parts = [
        ("b", torch.tensor(0.1)),
        ("a", torch.tensor(3)),
        ("b", torch.tensor(0.7, dtype=torch.float64)),
    ]
    for name, value in parts:
        sums.add(name, value, over=4)
    read = sums.read()
    assert list(read) == ["b", "a"]
    assert read == {"b": torch.tensor(0.1).item() / 4 + 0.7 / 4, "a": 0.75}
    assert Figures().read() == {}


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 1)
    reads = []

    def counted(scalars: Sequence[Tensor]) -> list[float]:
        reads.append(len(scalars))
        return read(scalars)

    read = figures.read
    monkeypatch.setattr(figures, "read", counted)

    def loss(batch: Tensor) -> Loss:
        total = layer(batch).sum()
        return total, {"seen": total.detach()}

    optimizer = optimizer_of(layer, max_grad_norm=0.1)
    term = LossTerm([torch.ones(3, 2), torch.ones(1, 2)], loss, 4)
    with Waits() as waits:
        optimizer.step([term])
    assert (waits.seen, reads) == ([], [5])  # loss and metric of two batches, a norm
