"""Resume points that several ranks write and read: cut, put together, damaged, killed."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.packing import PACKED, SHARED, Layout
from rlhf_cli.folders.integrity import described
from rlhf_cli.models.layouts import layout_of_all
from rlhf_cli.models.shards import is_sharded, own_part
from rlhf_cli.ranks.agreement import by_main, together
from rlhf_cli.ranks.world import world
from rlhf_cli.runs import resume_points
from rlhf_cli.runs.out_files import resume_point
from rlhf_cli.runs.resume_points import FILES, SEAL, load_checkpoint, save_checkpoint, seal_of
from rlhf_cli.runs.same_weights import checksum, require_same
from rlhf_cli.runs.slices import write_own
from tests.ranks import on_ranks

SHAPES = {"policy/a": (5, 3), "policy/b": (1, 4), "extra/best/a": (5, 3), "policy/c": (8,)}
WHOLE = {"optimizer/policy.0.step": torch.tensor(3.0), "extra/plain": torch.arange(6).view(2, 3)}
STATE: dict[str, Any] = {"logs": {}, "kl_coef": 0.1 + 0.2}


def values(step: int) -> dict[str, Tensor]:
    """Whole tensors, of which those of SHAPES will be sharded."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} | WHOLE


def sharded(step: int, copies: int = 1) -> dict[str, Tensor]:
    """The same on this rank, sharded over all ranks, or those of each of some copies."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (copies, world().size // copies), mesh_dim_names=("m", "r"))
    cut = [Replicate(), Shard(0)]
    return {
        name: distribute_tensor(value, mesh, cut) if name in SHAPES else value
        for name, value in values(step).items()
    }


def save(out: Path, steps: list[int], copies: int = 1) -> None:
    for step in steps:
        save_checkpoint(out, step, sharded(step, copies), STATE, keep=2)


def load(out: Path) -> tuple[int, list[str], list[str]]:
    """Load as sharded over all ranks; returns the step and what is not as it was saved."""
    target = sharded(0)
    found = load_checkpoint(out, lambda name, shape: target.get(name))
    assert found is not None
    tensors, state = found
    expected = sharded(state["step"])
    assert tensors.keys() == expected.keys() and state["kl_coef"] == STATE["kl_coef"]
    wrong = [
        name
        for name, tensor in tensors.items()
        if is_sharded(tensor) != (name in SHAPES)
        or not torch.equal(own_part(tensor), own_part(expected[name]))
    ]
    return state["step"], wrong, sorted(file.name for file in resume_point(out, 2).iterdir())


def load_whole(out: Path) -> int:
    """Load in one process; returns the step, whose tensors these are to the bit."""
    found = load_checkpoint(out)
    assert found is not None
    tensors, state = found
    expected = values(state["step"])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return int(state["step"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points of steps 1 and 2 by two ranks."""
    out = tmp_path_factory.mktemp("saved")
    on_ranks(2, save, out, [1, 2])
    return out


@pytest.fixture
def points(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "out")


# --------------------------------------------------------------------------- cut otherwise


def test_points_of_two_ranks_are_read_by_one_by_two_and_by_four(saved: Path) -> None:
    assert load_whole(saved) == 2
    names = [f"tensors-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    for size in (2, 4):
        for found in on_ranks(size, load, saved):
            assert found == (2, [], sorted([FILES, "state.json", *names]))
    second = load_file(resume_point(saved, 2) / names[1])
    assert torch.equal(second["policy/a"], values(2)["policy/a"][3:])
    assert "policy/b" not in second  # its one row is on rank 0


@pytest.mark.slow
def test_points_of_one_process_are_read_by_two_ranks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, values(2), STATE, keep=2)
    for found in on_ranks(2, load, tmp_path):
        assert found == (2, [], [FILES, "state.json", "tensors.safetensors"])


@pytest.mark.slow
def test_copies_of_several_machines_are_written_once(tmp_path: Path) -> None:
    on_ranks(4, save, tmp_path, [2], 2)
    assert load_whole(tmp_path) == 2
    third = resume_point(tmp_path, 2) / "tensors-00002-of-00004.safetensors"
    with safe_open(third, framework="pt") as stored:
        assert not list(stored.keys())


# --------------------------------------------------------------------------- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def reseal(file: Path) -> None:
    """Describe the files of a point anew, as somebody would who changed them on purpose."""
    point = file.parent
    names = json.loads((point / FILES).read_text()).keys() - {SEAL}
    files = described(point, names)
    seal = seal_of(point.parent.parent, point.name, files)
    (point / FILES).write_text(json.dumps({**files, SEAL: seal}))


class Crafted:
    """What runs a command as it is unpickled."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def crafted(file: Path) -> None:
    file.write_bytes(pickle.dumps(Crafted()))
    reseal(file)


def with_rows(rows: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        save_file(
            load_file(file), file, {"rows": rows if isinstance(rows, str) else json.dumps(rows)}
        )
        reseal(file)

    return change


def unlisted(file: Path) -> None:
    said = json.loads((file.parent / FILES).read_text())
    files = {name: entry for name, entry in said.items() if name not in (file.name, SEAL)}
    seal = seal_of(file.parent.parent.parent, file.parent.name, files)
    (file.parent / FILES).write_text(json.dumps({**files, SEAL: seal}))


SECOND = "tensors-00001-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, f"{SECOND} is missing"),
    "cut": (lambda file: os.truncate(file, 200), f"{SECOND} has 200 bytes instead of "),
    "flipped": (flip, f"{SECOND} is damaged: its bytes are not those that were written"),
    "a pickle": (crafted, "no tensors: "),
    "not listed": (unlisted, f"{FILES} is damaged"),
    "a gap": (
        with_rows({"policy/a": [4, 5], "extra/best/a": [3, 5], "policy/c": [4, 8]}),
        "row 3 of",
    ),
    "twice": (
        with_rows({"policy/a": [2, 5], "extra/best/a": [3, 5], "policy/c": [4, 8]}),
        "row 2 of",
    ),
    "other rows": (with_rows({"policy/a": [3, 6]}), "another shape or type"),
    "no rows": (with_rows("[1"), "no tensors: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_named_and_the_point_before_is_used(
    name: str, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGE[name]
    damage(resume_point(points, 2) / SECOND)
    assert load_whole(points) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert words in shown and "step-00000002" in shown and "is given up for the one before" in shown


@pytest.mark.slow
def test_ranks_give_up_a_damaged_point_together(points: Path) -> None:
    flip(resume_point(points, 2) / SECOND)
    shutil.copytree(resume_point(points, 1), points / "kept")
    assert [found[0] for found in on_ranks(2, load_first, points)] == [1, 1]
    assert (points / "checkpoints/.damaged-step-00000002").is_dir()


def load_first(out: Path) -> tuple[int, list[str]]:
    target = sharded(0)
    found = load_checkpoint(out, lambda name, shape: target.get(name))
    assert found is not None
    return found[1]["step"], []


# --------------------------------------------------------------------------- errors, kills


def save_with_a_fault(out: Path, fault: str) -> str:
    """The third point, in whose files rank 1 fails."""

    def instead(part: Path, tensors: Any) -> str:
        if world().rank == 1 and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if world().rank == 1:
            raise OSError(28, "No space left on device", str(part))
        return write_own(part, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume_points, "write_own", instead)
        try:
            save(out, [3])
        except OSError as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_all_and_leaves_the_points_before(points: Path) -> None:
    first, second = on_ranks(2, save_with_a_fault, points, "full")
    assert first == second and "No space left on device" in first
    assert sorted(each.name for each in (points / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


@pytest.mark.slow
def test_a_rank_that_is_killed_as_it_saves_leaves_the_points_before(points: Path) -> None:
    with pytest.raises((AssertionError, EOFError)):
        on_ranks(2, save_with_a_fault, points, "killed")
    assert load_whole(points) == 2
    assert on_ranks(2, save_again, points) == [3, 3]


def save_again(out: Path) -> int:
    save(out, [3])
    return load_first(out)[0]


# --------------------------------------------------------------------------- agreement


def agreements() -> dict[str, Any]:
    here = world().rank

    def fail(rank: int) -> int:
        if here == rank:
            raise RunError(f"rank {rank}")
        return here

    def said(work: Callable[[], Any]) -> str:
        try:
            work()
        except (RunError, RuntimeError, UnicodeDecodeError) as error:
            return str(error)
        return "nothing"

    def drifted(rank: int) -> None:
        weights = {"a": torch.ones(3), "b": torch.arange(8.0)}
        if here == rank:
            weights["b"][[2, 3]] = weights["b"][[3, 2]]
        require_same(weights, "after step 4")

    def unlike() -> None:
        if here == 1:
            raise UnicodeDecodeError("utf-8", b"a", 0, 1, "no")

    return {
        "on 1": said(lambda: together(lambda: fail(1))),
        "on 0": said(lambda: by_main(lambda: fail(0))),
        "not on main": said(lambda: by_main(lambda: fail(1))),
        "unlike": said(lambda: together(unlike)),
        "main": by_main(lambda: {"rank": here}),
        "same": said(lambda: drifted(9)),
        "drifted": said(lambda: drifted(1)),
        "sharded": said(lambda: require_same(sharded(1), "now")),
        "own seeds": said(lambda: require_same(sharded(1 + here), "now")),
    }


def test_what_one_rank_finds_all_say() -> None:
    first, second = on_ranks(2, agreements)
    assert first == second
    assert (first["on 1"], first["on 0"]) == ("rank 1", "rank 0")
    assert first["main"] == {"rank": 0}
    assert first["same"] == first["sharded"] == first["not on main"] == "nothing"
    assert first["drifted"].startswith(
        "ranks 0 and 1 hold different weights after step 4, b first: "
    )
    assert first["own seeds"] == "nothing" and "can't decode byte" in first["unlike"]


def test_a_checksum_tells_any_order_and_sign() -> None:
    base = torch.arange(6.0).view(2, 3)
    others = [base.flip(0), base + 0.0, -base, base.bfloat16(), base.bool()]
    sums = [checksum(each) for each in others]
    assert checksum(base) == sums[1] and len({*sums}) == len(others)
    assert checksum(torch.zeros(3)) != checksum(torch.tensor([0.0, -0.0, 0.0]))
    assert checksum(torch.tensor(2.0)) and checksum(torch.empty(0)) == 0


def found_layouts() -> list[tuple[Layout, str]]:
    found = (PACKED, "no memory") if world().rank else (SHARED, "")
    return [layout_of_all(*found), layout_of_all(SHARED, "")]


def test_a_layout_is_what_all_ranks_have_found() -> None:
    first, second = on_ranks(2, found_layouts)
    assert first == second == [(PACKED, "no memory"), (SHARED, "")]
