"""Several processes through torch.distributed: nccl for tensors on GPUs, gloo for all others.

What ranks tell each other (flags, JSON, gathered results) lies on the CPU, so that no GPU is waited
for; gradients are summed where they are.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from itertools import groupby
from math import prod
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.ranks.watch import Watch
from rlhf_cli.ranks.world import World

Value = TypeVar("Value")
Given = ParamSpec("Given")
BUCKET = 32 * 2**20  # bytes that are summed at once
GRACE = 60  # seconds that torch waits longer than the watch, which tells who is missing


def _meeting(
    method: "Callable[Concatenate[Group, Given], Value]",
) -> "Callable[Concatenate[Group, Given], Value]":
    """A method that all ranks call, in the same order: the watch looks who has not come."""

    @wraps(method)
    def meet(self: "Group", *args: Given.args, **kwargs: Given.kwargs) -> Value:
        if self.watch is None:
            return method(self, *args, **kwargs)
        with self.watch.meeting(method.__name__):
            return method(self, *args, **kwargs)

    return meet


class Group(World):
    """The ranks of an initialised process group."""

    def __init__(self, device: torch.device, watch: Watch | None = None) -> None:
        """`device`: of this rank, over which models are sharded. `watch`: on who comes to meet."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.device = device
        self.watch = watch

    def shard(self, over: str) -> None:
        """Over all ranks, or over those of a machine with copies on the others.

        Raises:
            UserError: machines have different numbers of ranks.
        """
        kind, self.mesh = self.device.type, None
        if over == "hybrid":
            if self.size % self.local_size:
                raise UserError(
                    f"hardware.shard=hybrid: {self.local_size} of {self.size} processes are on "
                    "this machine; it takes as many on each"
                )
            shape = (self.size // self.local_size, self.local_size)
            self.mesh = init_device_mesh(kind, shape, mesh_dim_names=("machines", "ranks"))
        elif over == "full":
            self.mesh = init_device_mesh(kind, (self.size,), mesh_dim_names=("ranks",))

    @_meeting
    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """In buckets, all on their way at once.

        Each element is summed in the same order, whatever lies beside it: two ranks give the bits
        of one process that adds the two.
        """
        waiting = []
        for _, alike in groupby(tensors, lambda tensor: (tensor.dtype, tensor.device)):
            for bucket in _buckets(list(alike)):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                waiting.append((dist.all_reduce(flat, async_op=True), flat, bucket))
        for work, flat, bucket in waiting:
            work.wait()
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @_meeting
    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """By their lengths and one padded row of numbers from each rank."""
        counts = torch.tensor([len(tensor) for tensor in tensors], dtype=torch.int64)
        lengths = self._rows(counts)
        shape = self._agreed_shape(tensors)
        if shape is None:
            return []
        dtype, rest = shape
        width = prod(rest)
        whole = self._rows(
            torch.cat([tensor.reshape(-1).cpu() for tensor in tensors])
            if tensors
            else torch.empty(0, dtype=dtype)
        )
        gathered: list[Tensor] = []
        for row, sizes in zip(whole, lengths, strict=True):
            parts = row.split([int(size) * width for size in sizes])
            gathered += [
                part.view(int(size), *rest) for part, size in zip(parts, sizes, strict=True)
            ]
        return gathered

    @_meeting
    def any(self, flag: bool) -> bool:
        """One small sum."""
        total = torch.tensor([float(flag)])
        dist.all_reduce(total)
        return bool(total.item() > 0)

    @_meeting
    def from_all(self, value: Value) -> list[Value]:
        """As JSON, never as a pickle; floats keep every digit."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(row.tolist())) for row in self._rows(text)]

    @_meeting
    def from_main(self, value: Value) -> Value:
        """As JSON too."""
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        own = torch.zeros(int(size.item()), dtype=torch.uint8)
        if self.is_main:
            own.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(own, 0)
        received: Value = json.loads(bytes(own.tolist()))
        return received

    def barrier(self, until: str) -> None:
        """A sum that nobody reads."""
        if self.watch is None:
            self.any(False)
        else:
            with self.watch.meeting(until):
                dist.all_reduce(torch.zeros(1))

    def _agreed_shape(self, tensors: Sequence[Tensor]) -> tuple[torch.dtype, list[int]] | None:
        """Type and further dimensions of what any rank gives; None where none gives anything."""
        types = [torch.uint8, torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]
        own: list[int] = []
        if tensors:
            own = [types.index(tensors[0].dtype), *tensors[0].shape[1:]]
        for row in self._rows(torch.tensor(own, dtype=torch.int64)):
            if len(row):
                kind, *rest = row.tolist()
                return types[kind], rest
        return None

    def _rows(self, own: Tensor) -> list[Tensor]:
        """The (n,) tensors of all ranks, of any lengths; on the CPU."""
        size = torch.tensor([len(own)])
        sizes = [torch.empty_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size)
        counts = [int(each.item()) for each in sizes]
        padded = torch.zeros(max(counts), dtype=own.dtype)
        padded[: len(own)] = own
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        if max(counts):
            dist.all_gather(rows, padded)
        return [row[:count] for row, count in zip(rows, counts, strict=True)]


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, in groups of at most BUCKET bytes or of one."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= size
    return buckets


def join(
    device: torch.device,
    seconds: int,
    say: Callable[[str], None],
    end: Callable[[str], None],
) -> Group:
    """The group that the environment names: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        device: of this rank.
        seconds: that ranks wait for one that does not come.
        say: takes a line, of the first rank that waits.
        end: ends the process with a line.

    Raises:
        RunError: not all ranks came.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    at_most, later = timedelta(seconds=seconds), timedelta(seconds=seconds + GRACE)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise UserError(
            "RANK is set, but not MASTER_ADDR and MASTER_PORT; torchrun sets all three, and else "
            "RANK is to be unset"
        )
    began = time.monotonic()
    try:
        dist.init_process_group(backend, timeout=later, device_id=own)
        # a client of its own, for a thread that waits in one keeps others out
        store = TCPStore(host, int(port), is_master=False, timeout=at_most)
    except dist.DistError as error:
        text = str(error).partition("\n")[0]
        waited = time.monotonic() - began
        raise RunError(
            f"rank {rank} waited {waited:.0f} s (hardware.rank_timeout={seconds}) for all {size} "
            f"ranks at {host}:{port}: {text}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run = PrefixStore(f"rlhf-cli/{attempt}", store)
    return Group(device, Watch(run, rank, size, seconds, say, end))
