"""Resume points as users meet them: damaged, refused, locked, on a full disk, cut by a signal."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.folders.integrity import described
from rlhf_cli.runs import lock, session
from rlhf_cli.runs.out_files import newest_step, resume_point, resume_points
from rlhf_cli.runs.resume_points import save_checkpoint
from rlhf_cli.runs.session import Session
from rlhf_cli.stages import dpo, evaluate, generate, ppo, reward, sft
from tests.pace import slow
from tests.tiny import DATA, words_of
from tests.training.test_stages import kill_at, lines, same, untimed, weights

pytestmark = pytest.mark.usefixtures("inside")

STAGES: dict[str, Callable[[Any], Path]] = {
    "sft": sft.run,
    "reward": reward.run,
    "dpo": dpo.run,
    "ppo": ppo.run,
}
EACH_STEP = "hardware.save_every=1"


def run(stage: str, out: Path, *more: str) -> Path:
    words = [*words_of(stage), EACH_STEP, f"out={out}", *more]
    return STAGES[stage](compose(stage, words))


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ppo that died in its fifth step, with resume points of the third and the fourth."""
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Exception, match="^$"):
            run("ppo", out)
    assert list(resume_points(out)) == [3, 4]
    return out


# --------------------------------------------------------------------------- damage


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit in tensors": ("tensors.safetensors", flip),
    "a flipped bit in numbers": ("state.json", flip),
    "cut tensors": ("tensors.safetensors", lambda file: os.truncate(file, 100)),
    "no numbers": ("state.json", Path.unlink),
    "a cut manifest": ("files.json", lambda file: os.truncate(file, 20)),
    "an empty manifest": ("files.json", lambda file: file.write_text("{}")),
    "another manifest": ("files.json", lambda file: file.write_text("[1]")),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.slow
def test_a_damaged_resume_point_is_named_and_the_one_before_is_used(
    name: str, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("ppo", tmp_path / "whole")
    file, damage = DAMAGE[name]
    damage(resume_point(killed, 4) / file)
    capsys.readouterr()
    run("ppo", killed)
    shown = capsys.readouterr().err
    assert f"checkpoints/step-00000004/{file}" in shown and "given up" in shown
    assert "resuming after step 3" in shown
    same(whole, killed)


def test_without_a_whole_resume_point_a_run_begins_again(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("ppo", tmp_path / "whole")
    for folder in resume_points(killed).values():
        flip(folder / "tensors.safetensors")
    run("ppo", killed)
    assert "resuming" not in capsys.readouterr().err
    same(whole, killed)


def test_a_disk_that_does_not_answer_costs_no_resume_point(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(folder: Path, files: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_cli.runs.resume_points.fault_in", unreachable)
        with pytest.raises(OSError, match="Stale"):
            run("ppo", killed)
    run("ppo", killed)
    same(run("ppo", tmp_path / "whole"), killed)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_has_lost_lines_is_not_gone_on_with(name: str, killed: Path) -> None:
    kept = (killed / name).read_bytes()
    (killed / name).write_bytes(kept[kept.index(b"\n") + 1 :])
    with pytest.raises(UserError, match=rf"{name} has lost or changed lines of the first 4 steps"):
        run("ppo", killed)
    (killed / name).write_bytes(kept)
    run("ppo", killed)


@pytest.mark.parametrize("name", ["metrics.jsonl"])
def test_a_damaged_last_line_of_a_log_costs_the_newest_resume_point_alone(
    name: str, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("ppo", tmp_path / "whole")
    state = json.loads((resume_point(killed, 4) / "state.json").read_text())
    content = bytearray((killed / name).read_bytes())
    content[state["logs"][name]["size"] - 9] ^= 1  # within the last line of step 4
    (killed / name).write_bytes(content)
    capsys.readouterr()
    run("ppo", killed, "hardware.keep_checkpoints=1")
    shown = capsys.readouterr().err
    assert f"{name} has lost or changed lines of the first 4 steps; this resume point" in shown
    assert "resuming after step 3" in shown
    same(whole, killed)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_text("{}")])
@pytest.mark.parametrize("name", ["inputs.json", "inputs.copy.json"])
@pytest.mark.slow
def test_damage_to_what_a_run_is_made_from_is_healed(
    name: str, damage: Callable[[Path], object], killed: Path, tmp_path: Path
) -> None:
    damage(killed / "checkpoints" / name)
    run("ppo", killed)
    same(run("ppo", tmp_path / "whole"), killed)


def forged(point: Path, **values: Any) -> None:
    """Other numbers, which files.json describes."""
    state = json.loads((point / "state.json").read_text())
    (point / "state.json").write_text(json.dumps({**state, **values}))
    files = json.loads((point / "files.json").read_text())
    files |= described(point, ["state.json"])
    (point / "files.json").write_text(json.dumps(files))


MISSHAPEN = [{"step": "x"}, {"step": 2}, {"logs": 3}, {"schedule": None}]


@pytest.mark.parametrize(
    "values",
    [{"kl_coef": 9.0}, *map(slow, MISSHAPEN)],
)
def test_forged_numbers_are_given_up(
    values: dict[str, Any], killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged(resume_point(killed, 4), **values)
    capsys.readouterr()
    run("ppo", killed)
    assert "resuming after step 3" in capsys.readouterr().err
    same(run("ppo", tmp_path / "whole"), killed)


def test_a_resume_point_of_another_step_is_none(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(resume_point(killed, 3), resume_point(killed, 5))
    capsys.readouterr()
    run("ppo", killed)
    assert "resuming after step 4" in capsys.readouterr().err
    same(run("ppo", tmp_path / "whole"), killed)


# --------------------------------------------------------------------------- when to save


def test_minutes_between_resume_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes 25 seconds: a resume point after each third one."""
    saved: list[int] = []
    save = Session.save

    def slowly(session: Session, step: int, *args: Any, **more: Any) -> None:
        session.saved -= 25
        save(session, step, *args, **more)
        if newest_step(session.out) == step:
            saved.append(step)

    monkeypatch.setattr(Session, "save", slowly)
    run("dpo", tmp_path / "out", "hardware.save_every=1min", "algo.epochs=2")
    assert saved == [3, 6, 9]


def test_what_saving_took_is_said_where_it_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("sft", tmp_path / "quick")
    assert "of it saving" not in capsys.readouterr().err

    def slowly(*args: Any) -> None:
        time.sleep(0.4)
        save_checkpoint(*args)

    monkeypatch.setattr(session, "save_checkpoint", slowly)
    run("sft", tmp_path / "out")
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "of it saving" in row]
    assert float(line.split(", ")[-1].split()[0]) >= 1.2  # three resume points


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_the_best_weights_are_written(stage: str, tmp_path: Path) -> None:
    """Held-out rows that are labelled the other way round: their loss rises with training."""
    pairs = lines(Path("rows.jsonl"))[:12]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in turned))
    words = [f"data.eval_path={held_out}", "algo.eval_every=1", "algo.epochs=1"]
    best = run(stage, tmp_path / "best", *words, "algo.keep=best")
    last = run(stage, tmp_path / "last", *words)
    seen = [row["eval/loss"] for row in lines(best / "metrics.jsonl")]
    assert min(seen) < seen[-1]
    written = json.loads((best / "stage.json").read_text())["metrics"]["eval/loss"]
    assert written == pytest.approx(min(seen), rel=1e-3)
    kept, plain = (untimed(each / "metrics.jsonl") for each in (best, last))
    by_objective = [row.pop("eval/objective") for row in kept] if stage == "reward" else []
    assert by_objective == [row["eval/loss"] for row in kept[: len(by_objective)]]
    assert kept == plain
    assert weights(best) != weights(last)


# --------------------------------------------------------------------------- other settings


def test_an_unfinished_run_goes_on_with_other_hardware_and_logging(
    killed: Path, tmp_path: Path
) -> None:
    whole = run("ppo", tmp_path / "whole")
    free = [
        "hardware.save_every=3",
        "hardware.keep_checkpoints=1",
        "algo.show_every=1",
        "algo.eval_every=3",
    ]
    run("ppo", killed, *free)
    assert weights(whole) == weights(killed)


def test_an_unfinished_run_may_be_given_more_steps(killed: Path, tmp_path: Path) -> None:
    """At a constant rate it is the longer run from the start."""
    constant = ["algo.lr_schedule=constant"]
    shutil.rmtree(killed)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Exception, match="^$"):
            run("ppo", killed, *constant)
    longer = run("ppo", tmp_path / "longer", *constant, "algo.steps=8")
    run("ppo", killed, *constant, "algo.steps=8")
    same(longer, killed)


def test_what_changes_the_mathematics_is_refused_with_a_list(killed: Path) -> None:
    other = ["algo.clip=0.1", "algo.steps=5", "algo.keep=reward", "seed=3", "algo.eval_every=2"]
    with pytest.raises(UserError) as error:
        run("ppo", killed, *other)
    assert (
        "made by another config (algo.clip: 0.2 -> 0.1, algo.eval_every: null -> 2, "
        "algo.keep: last -> reward, algo.steps: 6 -> 5, seed: 0 -> 3)"
    ) in str(error.value)


def test_an_unfinished_run_is_not_gone_on_with_on_other_input(killed: Path, tmp_path: Path) -> None:
    rows = Path("rows.jsonl").read_text()
    try:
        Path("rows.jsonl").write_text(rows.replace("Hi Ana", "Ho Ana"))
        with pytest.raises(UserError, match=r"another data.path \(rows.jsonl has changed since\)"):
            run("ppo", killed)
    finally:
        Path("rows.jsonl").write_text(rows)
    run("ppo", killed)
    Path("rows.jsonl").write_text(rows + "\n")
    try:
        with pytest.raises(UserError, match=r"another data.path \(rows.jsonl has changed since\)"):
            run("ppo", killed)
    finally:
        Path("rows.jsonl").write_text(rows)


def test_a_changed_function_makes_another_reward(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(prompts, responses):\n    return [len(r) for r in responses]\n")
    out = run("ppo", tmp_path / "out", f"reward={file}:f", "algo.steps=1")
    file.write_text("def f(prompts, responses):\n    return [-len(r) for r in responses]\n")
    with pytest.raises(UserError, match=r"another reward \(.*own.py has changed since\)"):
        run("ppo", out, f"reward={file}:f", "algo.steps=1")


def test_an_order_to_overwrite_is_carried_out_once(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command after a kill goes on; without a kill, or changed, it starts afresh."""
    whole = run("ppo", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Exception, match="^$"):
            run("ppo", killed, "overwrite=true")  # what began without the order is given up
    assert newest_step(killed) == 2
    capsys.readouterr()
    run("ppo", killed, "overwrite=true")
    assert "resuming after step 2" in capsys.readouterr().err
    same(whole, killed)
    run("ppo", killed, "overwrite=true")
    assert "resuming" not in capsys.readouterr().err


# --------------------------------------------------------------------------- what is emptied


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_stage_empties_what_another_wrote(killed: Path) -> None:
    """Though what samples has nothing of its own to lose."""
    lock.unlock(killed)
    before = contents(killed)
    some = ["policy=runs/demo/sft", "reward=regex:a", f"out={killed}", *DATA]
    with pytest.raises(UserError, match="is the folder of another stage"):
        evaluate.run(compose("evaluate", [*some, "baselines=[]", "gold=null"]))
    asked = ["policy=runs/demo/sft", f"out={killed}", "data=jsonl", "data.path=-"]
    limits = ["data.max_prompt_tokens=24", "data.max_response_tokens=8", "algo.max_tokens=8"]
    with pytest.raises(UserError, match="is the folder of another stage"):
        generate.run(compose("generate", [*asked, *limits]))
    assert contents(killed) == before


def test_an_out_that_holds_its_own_input_is_not_emptied(killed: Path) -> None:
    shutil.copy("rows.jsonl", killed / "rows.jsonl")
    with pytest.raises(UserError, match="holds the data.path that this stage reads"):
        run("ppo", killed, f"data.path={killed}/rows.jsonl", "overwrite=true")
    assert (killed / "rows.jsonl").exists()
    base = Path("runs/demo/sft")
    with pytest.raises(UserError, match="holds the base of the policy that this stage reads"):
        run("ppo", base, "policy=runs/demo/adapter", "overwrite=true")


def test_an_out_that_holds_another_run_is_not_emptied(killed: Path) -> None:
    run("sft", killed / "inside")
    with pytest.raises(UserError, match="holds another run, .*inside; name another out"):
        run("ppo", killed, "overwrite=true")


def test_a_file_of_ones_own_in_a_folder_is_ones_own(tmp_path: Path) -> None:
    out = run("dpo", tmp_path / "out", "algo.epochs=1", "algo.eval_every=99")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Exception, match="^$"):
            run("dpo", out, "overwrite=true")
    (out / "notes.txt").write_text("This is the second try.")
    run("dpo", out, "overwrite=true")
    said = json.loads((out / "stage.json").read_text())["files"]
    assert "model.safetensors" in said and "metrics.jsonl" in said and "notes.txt" not in said
    assert (out / "notes.txt").exists()


# --------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB; a stage leaves some 200 KiB, and a resume point as much again."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def command(stage: str, out: Path, *more: str) -> list[str]:
    script = Path(sys.executable).parent / "rlhf-cli"
    return [str(script), stage, *words_of(stage), EACH_STEP, f"out={out}", *more]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    whole = run("ppo", tmp_path / "whole")
    out = small_disk / "out"
    done = subprocess.run(command("ppo", out), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    error = done.stderr.splitlines()[-1]
    assert error.startswith("rlhf-cli: error: ") and "No space left on device" in error
    step = newest_step(out)
    assert (f"what was saved after step {step} is whole" if step else "nothing was saved") in error
    assert "Traceback" not in done.stderr and not list(out.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = subprocess.run(command("ppo", out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(whole, out)


def test_a_disk_that_fills_while_tensors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, for users who may not mount: as safetensors says it, half a file written."""
    out = tmp_path / "out"

    def full(tensors: Any, file: Path) -> None:
        if "step-00000003" in str(file):
            file.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_cli.runs.resume_points.save_file", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            run("ppo", out)
    assert error.value.errno == errno.ENOSPC
    assert list(resume_points(out)) == [1, 2] and not list(out.rglob("*.part"))
    run("ppo", out)
    same(run("ppo", tmp_path / "whole"), out)


def test_a_disk_that_becomes_read_only(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    out = small_disk / "out"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Exception, match="^$"):
            run("ppo", out)
    lock.unlock(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = subprocess.run(command("ppo", out), capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert "Read-only file system" in done.stderr.splitlines()[-1] or "permission" in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    run("ppo", out)
    same(run("ppo", tmp_path / "whole"), out)


# --------------------------------------------------------------------------- one at a time


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(command("ppo", out, "algo.steps=500"), stderr=subprocess.PIPE)
    wait_for(out / ".lock")
    assert str(first.pid) in (lock.running(out) or "")
    second = subprocess.run(command("ppo", out), capture_output=True, text=True)
    assert second.returncode == 75  # a queue tries again
    assert f"is being written by process {first.pid} on " in second.stderr
    first.kill()
    first.wait()
    assert lock.running(out) is None
    done = subprocess.run(command("ppo", out, "overwrite=true"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (out / ".lock").exists()


def wait_for(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


# --------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_ends_a_run_once_its_step_is_saved(number: signal.Signals, tmp_path: Path) -> None:
    """Even where resume points were not asked for."""
    seldom = "hardware.save_every=null"
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("ppo", out, seldom, "algo.steps=40"), stderr=subprocess.PIPE, text=True
    )
    wait_for(out / "samples.jsonl")
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 75
    step = newest_step(out)
    assert step is not None and 1 <= step < 40
    assert f"{number.name}: saved after step {step}; the same command goes on" in shown
    assert lines(out / "metrics.jsonl")[-1]["step"] == step
    whole = run("ppo", tmp_path / "whole", "algo.steps=40")
    run("ppo", out, seldom, "algo.steps=40")
    same(whole, out)


@pytest.mark.slow
def test_a_run_outlives_those_who_read_it(tmp_path: Path) -> None:
    """`rlhf-cli ... 2>&1 | tee log`: the same Ctrl-C ends tee."""
    out = tmp_path / "out"
    words = command("ppo", out, "hardware.save_every=null", "algo.steps=40")
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    wait_for(out / "samples.jsonl")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert newest_step(out) is not None


SLOW = """
import time
def slow(prompts, responses):
    open("{place}/begun", "w").close()
    time.sleep(60)
    return [0.0] * len(prompts)
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(place=tmp_path))
    words = command("ppo", tmp_path / "out", f"reward={tmp_path}/slow.py:slow")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "begun")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the step is not over
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_signals_without_end_change_nothing(tmp_path: Path) -> None:
    """After the first one, while a step is finished and saved and while Python ends."""
    out = tmp_path / "out"
    words = command("ppo", out, "hardware.save_every=null", "algo.steps=40")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(out / "samples.jsonl")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"SIGTERM: saved after step {newest_step(out)}; the same command goes on" in shown


# --------------------------------------------------------------------------- what is not finite


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    """A rate that throws weights out of float32: they are not saved, what was before is whole."""
    wild = ["algo.lr=1e38", "algo.warmup_steps=0", "algo.lr_schedule=constant"]
    with pytest.raises(RunError, match="is not finite|not finite"):
        run("dpo", tmp_path / "out", *wild, "algo.max_grad_norm=null")
    assert not weights(tmp_path / "out")
