"""Figures of a step wait for the device once, and sum as they did one by one."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.data.items import Answers
from rlhf_cli.data.kinds import Preference
from rlhf_cli.models.placing import place
from rlhf_cli.online.correction import Correction
from rlhf_cli.online.updates import Coefficients, Trajectory
from rlhf_cli.preferences.items import PreferenceItem
from rlhf_cli.stages.dpo import DpoObjective
from rlhf_cli.stages.grpo import GrpoObjective
from rlhf_cli.stages.sft import SftObjective
from rlhf_cli.training import figures
from rlhf_cli.training.figures import Figures
from rlhf_cli.training.loss_term import Loss, LossTerm
from tests.toys import DEVICE, FROZEN, composed, hardware_of, llama, sequences_of
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


def term_of(stage: str, dtype: torch.dtype = torch.float32) -> LossTerm:
    """The term of a step of a stage, on a small model."""
    model: Any = llama(40, num_hidden_layers=2, head_dim=8)
    place(model, FROZEN, dtype, DEVICE)
    hardware = hardware_of()
    sequences = sequences_of(4)
    if stage == "sft":
        return SftObjective(model, hardware).term(sequences)
    if stage == "dpo":
        row = Preference("", "", "")
        pairs = [Answers(each.prompt, [each.response, [5, 2]], row) for each in sequences]
        items = [PreferenceItem(each, torch.tensor([-3.0, -2.0])) for each in pairs]
        dpo = DpoObjective(model, composed("dpo").algo, hardware, (1.0, 1.0), None)
        return dpo.term(items, dpo.batchwise(items))
    policy, correction = SimpleNamespace(model=model), Correction("sequence", 2.0)
    roles: Any = SimpleNamespace(policy=policy, reference=None, loss=None, correction=correction)
    trajectories = []
    for each in sequences:
        own = torch.full((len(each.response),), -1.0)
        trajectories.append(Trajectory(each, own, own, own, advantages=own))
    return GrpoObjective(composed("grpo"), roles).terms(trajectories, Coefficients(0.1, 1.0))[0]


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_the_loss_of_a_stage_waits_for_nothing(stage: str) -> None:
    """From the micro-batch on the host to its gradient, while all rows are packed."""
    term = term_of(stage)
    with Waits() as waits:
        for batch in term.batches:
            loss, _ = term.loss(batch)
            loss.backward()
    assert not waits.seen
