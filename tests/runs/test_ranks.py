"""What a process makes of its environment, why several ended, and who keeps them waiting."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import PeerLost, UserError
from rlhf_cli.data.rows import Rows
from rlhf_cli.ranks.causes import OURS, Cause, cause_of, first_cause, is_echo, write_cause
from rlhf_cli.ranks.environment import Place, first_host, map_scheduler, place, tasks_of
from rlhf_cli.ranks.group import join
from rlhf_cli.ranks.watch import Watch
from rlhf_cli.runs.preflight import Plan, preflight

OF_SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_NODELIST": "gpu[003-008]",
}


def test_what_torchrun_says() -> None:
    assert place({}) is None and place({"RANK": "1"}) is None
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place(told) == Place(3, 4, 1, 2)
    assert place({"RANK": "0", "WORLD_SIZE": "1"}) == Place(0, 1, 0, 1)


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "2"}])
def test_what_cannot_be_is_a_line(wrong: dict[str, str]) -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **wrong}
    with pytest.raises(UserError, match="torchrun"):
        place(told)


def test_what_srun_says_becomes_what_torchrun_does() -> None:
    told = dict(OF_SRUN)
    map_scheduler(told)
    assert place(told) == Place(5, 7, 1, 3)
    assert told["MASTER_ADDR"] == "gpu007" and 20000 <= int(told["MASTER_PORT"]) < 40000
    beside = {**OF_SRUN, "SLURM_STEP_ID": "2"}
    map_scheduler(beside)
    assert beside["MASTER_PORT"] != told["MASTER_PORT"]


def test_what_is_said_already_stays() -> None:
    given = {**OF_SRUN, "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    map_scheduler(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"], given["RANK"]) == ("elsewhere", "1", "5")
    ranked = {**OF_SRUN, "RANK": "0", "WORLD_SIZE": "1"}
    before = dict(ranked)
    map_scheduler(ranked)
    assert ranked == before


@pytest.mark.parametrize("less", [{"SLURM_STEP_ID": None}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_and_a_step_of_one_task_are_no_ranks(less: dict[str, str | None]) -> None:
    told = {name: value for name, value in {**OF_SRUN, **less}.items() if value is not None}
    before = dict(told)
    map_scheduler(told)
    assert told == before


def test_lists_of_slurm() -> None:
    assert [tasks_of(node, "4(x2),3") for node in range(3)] == [4, 4, 3]
    hosts = {"a": "a", "gpu[003-006,9],login": "gpu003", "r[1-2]n[05-06]-ib,x": "r1n05-ib"}
    assert {nodes: first_host(nodes) for nodes in hosts} == hosts


def test_causes_go_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    cause = Cause(1, 2, "odd", 12.25, log="there")
    write_cause(str(file), cause)
    left = json.loads(file.read_text())
    assert cause_of(1, 2, left, 99.0) == cause
    # torch's own agents read these
    assert left["message"] == {"message": "odd", "extraInfo": {"timestamp": "12"}}
    assert cause_of(0, 5, {"message": "<NONE>"}, 3.0).line == "rank 0 left with exit status 5"
    assert OURS in left


ODD = Cause(1, 2, "odd", 12.0)
LOST = Cause(0, 1, "lost", 11.0, echo=True)
KILLED = cause_of(2, -9, {}, 12)
SAVED = Cause(0, 75, "SIGTERM: saved", 11.0)


@pytest.mark.parametrize(
    ("causes", "asked", "first"),
    [
        ([LOST, ODD], False, ODD),  # an echo is no cause, whenever it came
        ([LOST], False, LOST),  # but better than none
        ([ODD, Cause(0, 2, "odd", 12.5)], False, Cause(0, 2, "odd", 12.5)),  # of rank 0, if alike
        ([ODD, Cause(0, 2, "even", 12.5)], False, ODD),
        ([KILLED, LOST, Cause(1, 1, "worse", 42.0)], False, KILLED),
        ([SAVED, ODD], False, ODD),  # the agent sends a signal to those that are left
        ([SAVED, ODD], True, SAVED),
        ([cause_of(1, -15, {}, 10), ODD], False, ODD),
    ],
)
def test_the_first_cause(causes: list[Cause], asked: bool, first: Cause) -> None:
    assert first_cause(causes, asked) == first


def test_errors_that_are_echoes() -> None:
    assert is_echo(RuntimeError("[../gloo/transport/tcp/pair.cc:535] Connection closed by peer"))
    assert not is_echo(RuntimeError("shapes differ")) and not is_echo(ValueError("gloo"))


def watched(store: object, rank: int, seconds: float) -> tuple[Watch, list[str], list[str]]:
    said: list[str] = []
    ended: list[str] = []
    return Watch(store, rank, 2, seconds, said.append, ended.append), said, ended  # type: ignore[arg-type]


def test_the_watch_names_who_does_not_come() -> None:
    store = HashStore()
    waits, said, ended = watched(store, 0, 0.8)
    late, nothing, none = watched(store, 1, 0.8)
    with waits.meeting("reading"), late.meeting("reading"):
        pass
    with waits.meeting("writing"):
        time.sleep(1.2)
    waits.end()
    late.end()
    assert said[0].startswith("waited ") and "s for rank 1, which is in " in said[0]
    assert said[0].endswith("(writing); the run ends after 1 s") and len(said) == 1
    assert "rank 1, which is in" in ended[0] and "hardware.rank_timeout" in ended[0]
    assert nothing == none == []


def test_the_watch_sees_collectives_that_are_no_meetings() -> None:
    """As those of sharded weights: who has met as often, and is in none, is missing."""
    store = HashStore()
    waits, said, ended = watched(store, 0, 0.8)
    store.set("rank/1", json.dumps({"count": 0, "place": "a.py", "inside": False, "at": 0}))
    source = compile("time.sleep(1.3)", "/x/torch/distributed/collectives.py", "exec")
    exec(source, {"time": time})
    waits.end()
    assert "for rank 1, which is in a.py, not heard of for" in said[0]
    assert "hardware.rank_timeout" in ended[0]


def test_a_rank_that_works_long_keeps_nobody_waiting() -> None:
    store = HashStore()
    watches = [watched(store, rank, 0.4) for rank in range(2)]
    for watch, _, _ in watches:
        with watch.meeting("reading"):
            pass
    time.sleep(0.8)
    for watch, said, ended in watches:
        watch.end()
        assert said == ended == []


def test_what_torch_says_of_peers_becomes_a_loss() -> None:
    watch, _, _ = watched(HashStore(), 0, 60)
    with (
        pytest.raises(PeerLost, match=r"could not meet \(sum\): gloo: closed by peer$"),
        watch.meeting("sum"),
    ):
        raise RuntimeError("gloo: closed by peer\nand more")
    with pytest.raises(RuntimeError, match="shapes"), watch.meeting("sum"):
        raise RuntimeError("shapes")
    watch.end()


def test_processes_and_what_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.commands.launch import processes_of

    several = compose("sft", ["hardware=cpu", "hardware.processes=3"])
    assert processes_of(several) == 3
    assert processes_of(compose("sft", ["hardware=cpu", "hardware.processes=auto"])) == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert processes_of(compose("sft", ["hardware.processes=2"])) == 1
    assert processes_of(compose("sft", ["hardware=ddp", "hardware.device=cpu"])) == 1
    with pytest.raises(UserError, match="started 2"):
        processes_of(several)


def test_what_processes_are_told_is_not_kept_for_the_next_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlhf_cli.commands import agent
    from rlhf_cli.commands.launch import launch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, seen = dict(os.environ), dict[str, str]()

    def started(*args: object) -> None:
        seen.update(os.environ)

    monkeypatch.setattr(agent, "run_workers", started)
    cfg = compose("sft", ["hardware=cpu"])
    launch(cfg, Plan("free", Rows(cfg.data), {}, []), ["sft"], 2)
    assert seen["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


def test_a_stage_that_python_calls_starts_no_processes() -> None:
    from rlhf_cli.stages import sft

    with pytest.raises(UserError, match="hardware.processes=2 is for commands"):
        sft.run(compose("sft", ["hardware.processes=2"]))


def test_ranks_that_nobody_gives_the_rows_of_standard_input_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="data.path=-: several processes cannot read one"):
        preflight(compose("generate", ["data.path=-"]))


def test_more_processes_than_gpus_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rlhf_cli.commands.launch import processes_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes_of(compose("sft", ["hardware=ddp"])) == 2
    with pytest.raises(UserError, match="torch finds 2 GPUs, and each process takes one"):
        processes_of(compose("sft", ["hardware=gpu", "hardware.processes=3"]))


def test_each_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rlhf_cli.runs.device import device_of

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("rlhf_cli.runs.device.ask_for_repeatable_sums", lambda: None)
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for count, index in ((4, 2), (1, 0)):  # srun may show each task its own alone
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device_of("cuda") == chosen[-1] == torch.device("cuda", index)
    assert device_of("cpu") == torch.device("cpu") and len(chosen) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torch finds 2 GPUs"):
        device_of("cuda")


def test_the_place_of_a_thread_is_told_by_our_own_line() -> None:
    from rlhf_cli.ranks.watch import place_of

    assert place_of(None) == "no code"
    assert place_of(sys._getframe()).startswith(f"{__file__}:")


@pytest.mark.parametrize("port", ["", "abc"])
def test_a_place_to_meet_that_is_none_is_told(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT is no number"):
        join(torch.device("cpu"), 1, print, print)
