"""Weights from GPU to GPU: rank 0 broadcasts each tensor by NCCL to the workers of all servers.

The protocol is that of vLLM's `nccl` weight transfer, whose servers are started with
`--weight-transfer-config '{"backend": "nccl"}'`: `/init_weight_transfer_engine` has the workers of
a server join a group, in which this process is rank 0; then, for each update,
`/start_weight_update`, `/update_weights` with names, types and shapes, while tensors are broadcast
one by one in that order, and `/finish_weight_update`. The communicator is vLLM's own, so vLLM is
installed here as well.
"""

import json
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.dtypes import name_of, product_type_of
from rlhf_cli.models.save import working_weights
from rlhf_cli.rollout.server_client import ServerFault, each_of
from rlhf_cli.rollout.server_sync import FileSync, Server

Value = TypeVar("Value")


class Group(Protocol):
    """This process, as rank 0, with the workers of all servers."""

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor to all workers; it may still be on its way when this returns."""

    def wait(self) -> None:
        """Until all tensors have been sent."""


class NcclGroup:
    """A group of vLLM's own, beside torch.distributed."""

    def __init__(self, host: str, port: int, size: int, device: torch.device) -> None:
        """Wait for the others; `host` and `port`: where all of them meet, which is here."""
        from vllm.distributed.device_communicators.pynccl import (  # type: ignore[import-not-found]
            PyNcclCommunicator,
        )
        from vllm.distributed.utils import (  # type: ignore[import-not-found]
            StatelessProcessGroup,
        )

        torch.cuda.set_device(device)
        store = StatelessProcessGroup.create(host=host, port=port, rank=0, world_size=size)
        self._nccl, self._device = PyNcclCommunicator(store, device=device), device

    def broadcast(self, tensor: Tensor) -> None:
        """On the stream that the tensor is made on, which keeps its memory until then."""
        torch.cuda.set_device(self._device)  # of this thread
        here = tensor.to(self._device).contiguous()
        self._nccl.broadcast(here, src=0, stream=torch.cuda.current_stream())

    def wait(self) -> None:
        """Until the GPU is done."""
        torch.cuda.synchronize(self._device)


class NcclSync(FileSync):
    """The whole policy, adapters merged; files only start a server of the stage's own."""

    group_of: Callable[[str, int, int, torch.device], Group] = NcclGroup

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        super().__init__(folder, encoder)
        self._group: Group | None = None
        self._last = ""  # the label of what the group has sent

    def start(self, model: nn.Module, folder: Path) -> tuple[str, list[str]]:
        """As by files."""
        start, words = super().start(model, folder)
        return start, [*words, "--weight-transfer-config", json.dumps({"backend": "nccl"})]

    def send(
        self, model: nn.Module, servers: Sequence[Server], label: str, device: torch.device
    ) -> None:
        """Once: what is left half done in a group cannot be done again in it."""
        weights = working_weights(model, product_type_of(model))
        described = {
            "names": list(weights),
            "dtype_names": [name_of(each.dtype) for each in weights.values()],
            "shapes": [list(each.shape) for each in weights.values()],
        }
        try:
            _each(servers, Server.pause)
            group = self._joined(servers, device)
            _each(servers, lambda server: server.client.post("/start_weight_update"))

            def broadcast() -> None:
                for weight in weights.values():
                    group.broadcast(weight)
                group.wait()

            update = {"update_info": described}
            _beside(broadcast, servers, "/update_weights", lambda place: update)
            _each(servers, lambda server: server.client.post("/finish_weight_update"))
            _each(servers, lambda server: server.go_on(label))
        except ServerFault as fault:
            self._group = None
            raise RunError(
                f"weights did not get to the server by NCCL: {fault}; it may stay paused"
            ) from None
        self._last = label

    def _joined(self, servers: Sequence[Server], device: torch.device) -> Group:
        """The group that all are in; a new one, where one of them was started anew."""
        if self._group is not None and all(server.has_label(self._last) for server in servers):
            return self._group
        counts = [int(each["world_size"]) for each in _each(servers, _world)]
        size, host, port = 1 + sum(counts), _own_address(servers), _free_port()
        told = [
            {
                "master_address": host,
                "master_port": port,
                "rank_offset": 1 + sum(counts[:place]),
                "world_size": size,
            }
            for place in range(len(servers))
        ]
        made = type(self).group_of
        self._group = _beside(
            lambda: made(host, port, size, device),
            servers,
            "/init_weight_transfer_engine",
            lambda place: {"init_info": told[place]},
        )
        return self._group


def _world(server: Server) -> Any:
    return server.client.get("/get_world_size")


def _each(servers: Sequence[Server], work: Callable[[Server], Any]) -> list[Any]:
    """What `work` gives of each server, which are asked side by side."""
    clients = [server.client for server in servers]
    found = dict(each_of(clients, lambda _, server: work(server), servers))
    return [found[place] for place in range(len(servers))]


def _beside(
    work: Callable[[], Value],
    servers: Sequence[Server],
    route: str,
    body: Callable[[int], Any],
) -> Value:
    """What `work` gives, while each server does its part of it.

    NCCL waits for all, and has no end of its own: it is left to itself where one of them fails.

    Args:
        body: of the request to a server, by its place.

    Raises:
        ServerFault: of a server, or of NCCL here.
    """
    here: Future[Value] = Future()

    def run() -> None:
        try:
            here.set_result(work())
        except Exception as error:
            here.set_exception(error)
            for server in servers:
                server.client.give_up()  # they wait for what will not come

    threading.Thread(target=run, daemon=True, name="nccl").start()
    clients = [server.client for server in servers]
    try:
        places = range(len(servers))
        for _ in each_of(clients, lambda client, i: client.post(route, body(i), tries=1), places):
            pass
        return here.result(clients[0].timeout)
    except TimeoutError:
        seconds = f"{clients[0].timeout:g}"
        line = f"NCCL has not ended within {seconds} s (hardware.rollout_timeout)"
        raise ServerFault(line) from None
    except ServerFault:
        if (failure := here.exception(0) if here.done() else None) is None:
            raise
        raise ServerFault(_in_words(failure)) from failure
    except Exception as failure:
        raise ServerFault(_in_words(failure)) from failure


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _own_address(servers: Sequence[Server]) -> str:
    """This machine's, as all servers see it: as one elsewhere does, where there is one."""
    found = [_address_towards(server.url) for server in servers]
    return next((each for each in found if not each.startswith("127.")), found[0])


def _address_towards(url: str) -> str:
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.connect((parts.hostname, parts.port or 80))  # nothing is sent
        address: str = own.getsockname()[0]
        return address


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("", 0))
        port: int = own.getsockname()[1]
        return port
