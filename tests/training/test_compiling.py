"""When training passes are compiled, by the times of the first steps, and what if they fail."""

from typing import Any

import pytest
from torch import nn

from rlhf_cli.models import compiled
from rlhf_cli.training import compiling
from rlhf_cli.training.compiling import Compiling
from rlhf_cli.training.loss_term import LossTerm
from tests.toys import hardware_of, llama
from tests.training.test_optimize import PLAIN, SEQUENCES, TOKENS, Language, optimizer_of


class Timed(Compiling):
    """Networks on a GPU that there is not."""

    def __init__(self, **hardware: Any) -> None:
        super().__init__({"policy": llama()}, hardware_of(**hardware))
        self._waits = hardware["compile"] == "auto"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def compile_blocks(model: nn.Module) -> int:
        calls.append(1)
        return 2

    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    return calls


def test_a_long_run_is_compiled_after_its_first_steps(
    counted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = Timed(compile="auto"), Timed(compile="auto")
    for left in range(400, 396, -1):
        assert not counted
        long.after_step(100.0 if left == 400 else 1.0, left)
    assert len(counted) == 1 and long.state() == {"compiled": 1, "steps_timed": 4}
    assert capsys.readouterr().err.startswith("397 steps would take 7 minutes: training passes")
    for left in range(170, 160, -1):
        short.after_step(1.0, left)
    again = Timed(compile="auto")
    again.load(short.state())
    again.after_step(99.0, 99)
    assert len(counted) == 1
    resumed = Timed(compile="auto")
    resumed.load(long.state())
    assert len(counted) == 2 and not capsys.readouterr().err


def test_a_cpu_and_a_key_that_says_so_decide_at_once(counted: list[int]) -> None:
    Compiling({"policy": llama()}, hardware_of()).after_step(999.0, 999)
    Compiling({"policy": llama()}, hardware_of(compile=False)).after_step(999.0, 999)
    assert not counted
    Compiling({"policy": llama()}, hardware_of(compile=True))
    assert counted


def test_what_was_compiled_before_runs_plainly_at_first() -> None:
    """As after a resume, where an earlier optimizer, as of a bootstrap, has not been."""
    model = llama()
    kinds = [type(each) for each in model.modules()]
    compiled.compile_blocks(model, "eager")
    assert [type(each) for each in model.modules()] != kinds
    Compiling({"policy": model}, hardware_of())
    assert [type(each) for each in model.modules()] == kinds


def test_passes_that_cannot_be_compiled_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler\nhere")

    monkeypatch.setattr(
        compiling, "compile_blocks", lambda model: compiled.compile_blocks(model, refuses)
    )
    reports = []
    for hardware in (PLAIN, hardware_of(compile=True)):
        language = Language()
        optimizer = optimizer_of(language.model, hardware=hardware)
        term = LossTerm([SEQUENCES], language.loss, TOKENS)
        reports.append([optimizer.step([term]) for _ in range(2)])
    assert reports[0] == reports[1]
    said = capsys.readouterr().err
    assert said.startswith("note: training passes cannot be compiled here, and run as they are (")
    assert said.count("\n") == 1
