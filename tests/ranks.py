"""Work done by several ranks on this machine, through gloo."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

# Processes are forked off one that has imported what takes long, and has never computed anything.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "rlhf_cli.stages.ppo", "tests.ranks"])
get_temp_dir()  # for good, before a test may move it: addresses of sockets have to be short


def on_ranks(size: int, work: Callable[..., Any], *args: Any, seconds: int = 120) -> list[Any]:
    """What `work(*args)` returns on each of `size` ranks; it is a function of a test module.

    Raises:
        AssertionError: a rank raised, with its traceback, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            _CONTEXT.Process(target=_rank, args=(rank, size, folder, pipes[rank][1], work, args))
            for rank in range(size)
        ]
        for each in ranks:
            each.start()
        answers: list[Any] = []
        try:
            for (answer, _), each in zip(pipes, ranks, strict=True):
                wait([answer, each.sentinel], seconds)
                gone = "killed" if each.exitcode else "still at work"
                answers.append(answer.recv() if answer.poll() else (None, gone))
        finally:
            for each in ranks:
                each.join(5)
                each.kill()
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [value for value, _ in answers]


def _rank(
    rank: int,
    size: int,
    folder: str,
    answer: "Connection",
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from rlhf_cli.ranks.group import Group
    from rlhf_cli.ranks.world import enter

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    store = dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[attr-defined]
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    enter(Group(torch.device("cpu")))
    try:
        answer.send((work(*args), None))
    except BaseException:
        answer.send((None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
