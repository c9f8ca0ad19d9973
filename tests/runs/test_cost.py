"""What a line of metrics says of the time and the memory that its step took."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.data.items import Answers, Judged, Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.ranks.world import world
from rlhf_cli.runs import cost
from tests.ranks import on_ranks

CPU = torch.device("cpu")
ITEMS: list[Judged] = [
    Tokens([1, 2, 3], [4, 5]),
    Answers([1], [[2], [3, 4], [5]], Prompt("p", {}, "f:1")),
]
"""5 tokens, and 2 + 3 + 2."""


def test_all_sequences_count_with_their_prompts() -> None:
    assert cost.cost_of(ITEMS, 0.5, CPU)["tokens_per_second"] == 24
    assert cost.cost_of([], 0.5, CPU)["tokens_per_second"] == 0  # a step that learnt nothing


def test_a_peak_is_in_gib_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cost.cost_of(ITEMS, 1, CPU)["peak_memory"]
    held = torch.ones(64 * 2**20)  # a quarter of a GiB
    most = cost.cost_of(ITEMS, 1, CPU)["peak_memory"]
    del held
    # the kernel counts pages in batches
    assert cost.cost_of(ITEMS, 1, CPU)["peak_memory"] == pytest.approx(most, abs=0.01)
    assert before <= most <= before + 0.3
    status = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert status and most == pytest.approx(int(status[1]) / 2**20, rel=0.5)
    monkeypatch.setattr(cost, "STATUS", Path("nowhere"))  # as on other systems
    assert cost.cost_of(ITEMS, 1, CPU)["peak_memory"] == pytest.approx(most, rel=0.5)


@pytest.mark.slow
def test_a_process_does_not_count_what_its_parent_had() -> None:
    """As getrusage does, of a child that a large process starts."""
    held = torch.ones(128 * 2**20)
    code = "from rlhf_cli.runs.cost import *; print(peak_bytes(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < held.nbytes


def of_rank(_: Path) -> tuple[float, float]:
    """What a rank logs that holds more the higher it is."""
    held = torch.ones((1 + 32 * world().rank) * 2**20)
    own = cost.peak_bytes(CPU) / 2**30
    del held
    return own, cost.cost_of(ITEMS, 1, CPU)["peak_memory"]


@pytest.mark.slow
def test_of_several_ranks_the_one_with_most_is_told(tmp_path: Path) -> None:
    told = on_ranks(2, of_rank, tmp_path)
    most = max(own for own, _ in told)
    assert [logged for _, logged in told] == [pytest.approx(most, rel=0.02)] * 2
    assert told[0][1] == told[1][1]  # to the bit: all ranks log the same
