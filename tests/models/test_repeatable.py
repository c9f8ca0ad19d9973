"""Gradients that are summed in the same order each time, where torch can."""

from collections.abc import Iterator

import pytest
import torch

from rlhf_cli.models import repeatable
from rlhf_cli.models.repeatable import ask_for_repeatable_sums, repeatably


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on CUDA; all settings are back afterwards."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    enabled, lax = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(repeatable, "_loose", set())
    ask_for_repeatable_sums()
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=lax)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def strict() -> bool:
    """Whether attention takes a fixed order: it does so only where errors are asked for."""
    lax = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not lax


@pytest.mark.usefixtures("asked")
def test_work_is_strict_and_nothing_else_is() -> None:
    assert repeatably(strict, lambda: pytest.fail("done again"))
    assert not strict()


@pytest.mark.usefixtures("asked")
@pytest.mark.filterwarnings("ignore:put_ does not have a deterministic")
def test_what_has_no_fixed_order_is_told_once_and_done_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[bool | None] = []

    def work() -> float:
        seen.append(strict())
        return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0])).sum().item()

    for _ in range(2):
        assert repeatably(work, lambda: seen.append(None)) == 2.0
    assert seen == [True, None, False, False]
    assert capsys.readouterr().err.count("put_ sums in no fixed order") == 1
