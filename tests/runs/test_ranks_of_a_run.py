"""Runs that several ranks share: one folder, one end, and the same bytes after a stop."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import Interrupted, RunError, UserError
from rlhf_cli.data.order import derived_seed
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.runs import interrupts, session
from rlhf_cli.runs.out_files import resume_points
from rlhf_cli.stages import dpo, grpo, ppo, reward, sft
from tests.contents import contents_of, faults_of
from tests.pace import slow
from tests.ranks import on_ranks
from tests.tiny import WORDS, words_of

STAGES: dict[str, Any] = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
UNLIKE = ("config.yaml", "reliability.png")  # which name `out`
GO_ON = "the same command goes on"
TOLD = ("resuming", "note", "SIG", "rank")  # begins the lines that are compared


def run(
    stage: str, folder: Path, out: Path, *more: str, stop: tuple[int, int] | None = None
) -> list[str]:
    """Run a stage; returns what its session says, and the line in which it ends early.

    Args:
        stop: a step in which a rank gets a signal.
    """
    write, said = JsonLines.write, list[str]()

    def writing(log: JsonLines, step: int, metrics: dict[str, Any]) -> None:
        if stop == (step, world().rank):
            interrupts._Stop.asked = signal.SIGTERM.name
        write(log, step, metrics)

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "write", writing)
        patch.setattr(interrupts._Stop, "asked", None)
        patch.setattr(session, "say", said.append)
        try:
            STAGES[stage].run(compose(stage, [*words_of(stage), f"out={out}", *more]))
        except (Interrupted, RunError, UserError) as error:
            said.append(str(error))
    return [line for line in said if line.startswith(TOLD) and not line.startswith("ranks: ")]


def same(ours: Path, theirs: Path) -> None:
    """Two folders are whole, and hold the same but for their names and times."""
    assert not faults_of(ours)
    found, expected = contents_of(ours), contents_of(theirs)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name not in UNLIKE)


def near(ours: Path, theirs: Path) -> None:
    """The weights of two folders are the same but for rounding."""
    found, expected = (load_file(out / "model.safetensors") for out in (ours, theirs))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def twice(stage: str, folder: Path, outs: Path, *more: str) -> list[list[str]]:
    """A run that goes through, one that is stopped and goes on, and one that is left stopped."""
    return [
        run(stage, folder, outs / "whole", *more),
        run(stage, folder, outs / "out", *more, stop=(3, 1)),
        run(stage, folder, outs / "out", *more),
        run(stage, folder, outs / "out", *more),
        run(stage, folder, outs / "left", *more, stop=(3, 0)),
    ]


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_and_they_go_on_together(chain: Path, tmp_path: Path) -> None:
    stopped = [f"SIGTERM: saved after step 3; {GO_ON}"]
    for said in on_ranks(2, twice, "sft", chain, tmp_path):
        assert said == [[], stopped, ["resuming after step 3"], [], stopped]
    same(tmp_path / "out", tmp_path / "whole")
    point = resume_points(tmp_path / "left")[3]
    assert sorted(file.name for file in point.iterdir()) == [
        *("files.json", "state.json", "tensors.safetensors")
    ]


@pytest.mark.parametrize("more", [[], slow([*WORDS["lora"], "model.merge_lora=true"])])
def test_sharded_weights_are_saved_in_parts_and_written_whole(
    more: list[str], chain: Path, tmp_path: Path
) -> None:
    stopped = [f"SIGTERM: saved after step 3; {GO_ON}"]
    for said in on_ranks(2, twice, "reward", chain, tmp_path, "hardware.shard=full", *more):
        assert said == [[], stopped, ["resuming after step 3"], [], stopped]
    same(tmp_path / "out", tmp_path / "whole")
    point = resume_points(tmp_path / "left")[3]
    assert len(list(point.glob("tensors-*-of-00002.safetensors"))) == 2
    assert run("reward", chain, tmp_path / "left", *more) == [
        "resuming after step 3",
        "note: this run was on 2 processes, sharded over 2 up to there and is on 1 process from "
        "here on: it ends equal up to rounding, not to the last bit",
    ]
    run("reward", chain, tmp_path / "alone", *more)
    for name in ("left", "alone"):
        near(tmp_path / name, tmp_path / "whole")


KEPT = ["algo.ema_decay=0.8", "algo.keep=eval/reward", "algo.eval_every=1", "algo.eval_prompts=4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["ppo", *KEPT],
        ["grpo", "algo.keep=eval/reward", "algo.eval_every=1", "algo.eval_prompts=4"],
        ["dpo", "reference=bootstrap", "algo.bootstrap_epochs=1"],
        ["dpo", *WORDS["lora"], "algo.keep=best"],
    ],
)
def test_sharded_stages_go_on_to_the_bit(words: list[str], chain: Path, tmp_path: Path) -> None:
    stage, *more = words
    stopped = [f"SIGTERM: saved after step 3; {GO_ON}"]
    for said in on_ranks(2, twice, stage, chain, tmp_path, "hardware.shard=full", *more):
        assert said[1:4] == [stopped, ["resuming after step 3"], []]
    same(tmp_path / "out", tmp_path / "whole")


def of_other_settings(folder: Path, out: Path) -> list[str]:
    return run("sft", folder, out, f"seed={world().rank}")


def of_other_weights(folder: Path, out: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "derived_seed", lambda *names: derived_seed(*names) + world().rank)
        return run("sft", folder, out)


@pytest.mark.slow
def test_ranks_that_do_not_start_alike_do_not_start(chain: Path, tmp_path: Path) -> None:
    lines = on_ranks(2, of_other_settings, chain, tmp_path / "a")
    assert (
        lines[0]
        == lines[1]
        == ["rank 1 was started with seed=1, and rank 0 with 0: all ranks need the same command"]
    )
    assert not (tmp_path / "a").exists()
    lines = on_ranks(2, of_other_weights, chain, tmp_path / "b")
    assert lines[0] == lines[1] and "hold different weights at the start, policy/" in lines[0][0]


# Found by every Python that is started with its folder in PYTHONPATH: the stage as it is, one of
# whose ranks is killed once, as it writes the third resume point.
KILLS = """
import os, signal, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

NAME = "rlhf_cli.stages.reward"

class Killing:
    def find_spec(self, name, path=None, target=None):
        if name == NAME:
            sys.meta_path.remove(self)
            prepare()

sys.meta_path.insert(0, Killing())

def prepare():
    from rlhf_cli.ranks.world import world
    from rlhf_cli.runs import resume_points

    write, flag = resume_points.{where}, Path(os.environ["FLAG"])

    def killed(*given):
        part = next(each for each in given if "step-" in str(each))
        if "step-00000003" in str(part) and world().rank == {rank} and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*given)

    resume_points.{where} = killed
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "where"), [(1, "write_own"), (0, "_seal")])
def test_a_rank_that_is_killed_as_it_saves_costs_nothing(
    rank: int, where: str, chain: Path, tmp_path: Path
) -> None:
    sharded = ["hardware.shard=full", "hardware.save_every=1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    on_ranks(2, run, "reward", chain, whole, *sharded)
    (tmp_path / "sitecustomize.py").write_text(KILLS.format(where=where, rank=rank))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = [*words_of("reward"), *sharded, "hardware.processes=2", "hardware.max_restarts=1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlhf_cli", "reward", *words, f"out={out}"],
        cwd=chain,
        env={**os.environ, "PYTHONPATH": path, "FLAG": str(tmp_path / "killed")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert "resuming after step 2" in done.stderr
    same(out, whole)


def run_on_its_own_disk(folder: Path, disks: Path, *more: str) -> list[list[str]]:
    """`sft` in a folder of this rank, with the same words on all: stopped, and gone on with."""
    disk = disks / str(world().rank)
    disk.mkdir(parents=True)
    for entry in folder.iterdir():
        (disk / entry.name).symlink_to(entry)
    stopped = run("sft", disk, Path("own"), *more, stop=(3, 1))
    return [stopped, run("sft", disk, Path("own"), *more)]


@pytest.mark.slow
def test_machines_need_no_common_disk(chain: Path, tmp_path: Path) -> None:
    """Rank 0 alone has the resume point, and sends it; parts of sharded weights need one disk."""
    on_ranks(2, run, "sft", chain, tmp_path / "whole")
    for said in on_ranks(2, run_on_its_own_disk, chain, tmp_path / "a"):
        assert said == [[f"SIGTERM: saved after step 3; {GO_ON}"], ["resuming after step 3"]]
    same(tmp_path / "a" / "0" / "own", tmp_path / "whole")
    assert not (tmp_path / "a" / "1" / "own").exists()
    sharded = ("hardware.shard=full",)
    for said in on_ranks(2, run_on_its_own_disk, chain, tmp_path / "b", *sharded):
        assert "out must be on a disk that all machines share" in said[0][-1]
