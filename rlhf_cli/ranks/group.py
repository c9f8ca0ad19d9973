"""Several processes through torch.distributed: nccl for tensors on GPUs, gloo for all others.

What ranks tell each other (flags, JSON, gathered results) lies on the CPU, so that no GPU is waited
for; gradients are summed where they are.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from itertools import groupby
from math import prod
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.ranks.rendezvous import Rendezvous
from rlhf_cli.ranks.watch import Watch
from rlhf_cli.ranks.world import World

Value = TypeVar("Value")
Given = ParamSpec("Given")
BUCKET = 32 * 2**20  # bytes that are summed at once
TURN = timedelta(seconds=1)  # that rank 0 is waited for at once
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

    def __init__(
        self, device: torch.device, watch: Watch | None = None, store: Store | None = None
    ) -> None:
        """
        Args:
            device: of this rank, over which models are sharded.
            watch: on who comes to meet.
            store: of this thread alone, where ranks say that they are done with work of their own.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.device = device
        self.watch, self._store = watch, store
        self._led = 0  # pieces of work that some ranks did for all

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

    @_meeting
    def send(self, tensor: Tensor) -> None:
        """As bytes, of whatever type."""
        if tensor.numel():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)

    def lead(self, work: Callable[[], Value], leads: bool | None = None) -> Value | None:
        """All wait for all by the store, where no collective has an end to be over."""
        if self.watch is None or self._store is None:
            return super().lead(work, leads)
        self._led += 1
        keys = [f"{self._led}/{rank}" for rank in range(self.size)]
        given: Value | None = None
        try:
            if leads or (leads is None and self.is_main):
                with self.watch.leading():
                    given = work()
        finally:
            self._store.set(keys[self.rank], "")
            self._store.delete_key(f"{self._led - 1}/{self.rank}")  # all have seen it
        with self.watch.meeting("work for all"):
            while not self._all_set(keys):
                continue
        return given

    def _all_set(self, keys: list[str]) -> bool:
        """Whether all have set their keys; it is waited for in turns, between which signals are
        heard.
        """
        assert self._store is not None
        try:
            self._store.wait(keys, TURN)
        except dist.DistStoreError as error:
            if "timeout" not in str(error).lower():
                raise
            return False
        return True

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
        UserError: the environment does not say where they meet.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    later = timedelta(seconds=seconds + GRACE)
    if not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT", "").isdecimal():
        raise UserError(
            "RANK is set, but not MASTER_ADDR, or MASTER_PORT is no number; torchrun sets all, "
            "and else RANK is to be unset"
        )
    all_here = Rendezvous(rank, size, seconds, say)
    try:
        dist.init_process_group(
            backend,
            store=all_here.client("group"),
            rank=rank,
            world_size=size,
            timeout=later,
            device_id=own,
        )
    except dist.DistError as error:
        text = str(error).partition("\n")[0]
        raise RunError(f"rank {rank} of {size}: {text}") from error
    watch = Watch(all_here.client("watch", own=True), rank, size, seconds, say, end)
    return Group(device, watch, all_here.client("lead", own=True))
