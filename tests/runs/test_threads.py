"""How many CPU threads a run takes."""

from collections.abc import Iterator

import pytest
import torch

from rlhf_cli.runs.device import set_threads


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "parameters", "taken"), [(2, 1e5, 2), (2, 1e9, 2), (None, 1e5, 1), (None, 1e9, 3)]
)
def test_small_models_take_one_unless_told(
    threads: int | None, parameters: float, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads(threads, parameters)
    assert torch.get_num_threads() == taken


def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads(None, 1e5)
    assert torch.get_num_threads() == 3
