"""How weights get into vLLM servers: rank 0 has them, and asks each server to take them.

By files: as safetensors in a folder, which each server loads by `reload_weights`. By adapter: the
adapter of the policy alone, which each server puts on its base (`/v1/load_lora_adapter`). By nccl
(server_nccl.py): from GPU to GPU.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.files import remove, whole_folder
from rlhf_cli.models.adapters import POLICY, base_is_as_stored, below, is_adapted
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dtypes import product_type_of
from rlhf_cli.models.save import save_model, save_tokenizer, save_working
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.server_client import Client, ServerFault, each_of

ATTEMPTS = 3  # to give weights to a server that answers with faults
RESETS, PAUSE = 5, 0.5  # of a prefix cache that is still held, and seconds between them
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass
class Server:
    """One of the servers, as rank 0 knows it.

    name: of the model that it serves.
    longest: tokens that it takes for one sequence; 0 where it does not say.
    """

    client: Client
    name: str = ""
    longest: int = 0

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    def has_label(self, label: str) -> bool:
        """Whether its weights are those that were named so; none that was started anew has it."""
        return bool(self.client.get("/weight_info")["weight_version"] == label)

    def pause(self) -> None:
        """Nothing is drawn from half of the weights."""
        self.client.post("/pause?mode=wait")

    def go_on(self, label: str) -> None:
        """Name the weights that it has loaded, forget what was cached of others, and resume."""
        self.client.post("/update_weight_version", {"new_version": label})
        for _ in range(RESETS):
            if self.client.post("/reset_prefix_cache")["success"]:
                break
            time.sleep(PAUSE)
        else:
            raise ServerFault(f"{self.url} does not reset its prefix cache")
        self.client.post("/resume")
        if not self.has_label(label):
            raise ServerFault(f"{self.url} has lost the label of the weights that it was given")


class Sync(ABC):
    """One way of weights to servers.

    adapter_alone: the base of the policy is not sent, and need not be put together.
    starts_up_to_date: a server of the stage's own begins with the weights of the policy.
    """

    adapter_alone = False
    starts_up_to_date = True

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        """`folder`: for what servers read, by the same path."""
        self._folder, self._encoder = folder, encoder

    @abstractmethod
    def start(self, model: nn.Module, folder: Path) -> tuple[str, list[str]]:
        """What a server of the stage's own is started with, on rank 0: model and further words.

        Args:
            folder: for weights, where there are none that it could read.

        Raises:
            RunError: this way is not for such a policy.
        """

    @abstractmethod
    def send(
        self, model: nn.Module, servers: Sequence[Server], label: str, device: torch.device
    ) -> None:
        """Give all servers the weights of a model that is whole on this rank, under a label.

        Args:
            device: of this rank; sharded weights were put together on its CPU.

        Raises:
            ServerFault, RunError: one of them does not take them.
        """

    def tidy(self, label: str) -> None:  # noqa: B027
        """Remove what lies on disk of weights that all servers were proven to have."""

    def is_there(self, server: Server, label: str) -> bool:
        """Whether a server has the weights of this label."""
        return server.has_label(label)

    def name_for(self, server: Server, label: str) -> str:
        """By which name requests get these weights."""
        return server.name


class FileSync(Sync):
    """The whole policy, adapters merged, as files."""

    _started_with: Path | None = None

    def start(self, model: nn.Module, folder: Path) -> tuple[str, list[str]]:
        """The policy itself, so that it need not load twice."""
        self._started_with = folder
        self._write(model, folder)
        save_tokenizer(self._encoder.tokenizer, folder)
        for name, content in getattr(unwrap(model), "processors", {}).items():
            (folder / name).write_bytes(content)
        return str(folder), []

    def send(
        self, model: nn.Module, servers: Sequence[Server], label: str, device: torch.device
    ) -> None:
        """Write once, and have each server load it."""
        folder = self._folder / label
        self._write(model, folder)
        try_each(servers, lambda server: self._load(server, folder, label), folder)

    def tidy(self, label: str) -> None:
        """Weights that all servers have read; what a server was started with beside them stays."""
        folder = self._folder / label
        remove([folder] if folder != self._started_with else folder.glob("*.safetensors*"))

    def _write(self, model: nn.Module, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            save_working(model, part, product_type_of(model))

    def _load(self, server: Server, folder: Path, label: str) -> None:
        server.pause()
        load = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(folder)},
            "timeout": server.client.timeout,
        }
        server.client.post("/collective_rpc", load, tries=1)
        server.go_on(label)


class AdapterSync(Sync):
    """The policy's adapter alone, under a name of its own for each version.

    Requests name it, so that nothing is drawn from another version, and a server that was started
    anew has none of that name. What is cached of prompts is cached by adapter.
    """

    adapter_alone = True
    starts_up_to_date = False

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        super().__init__(folder, encoder)
        self._last: dict[str, str] = {}  # the name of the newest adapter, by server

    def start(self, model: nn.Module, folder: Path) -> tuple[str, list[str]]:
        """The base as it is stored."""
        self._check(model)
        adapted: Any = model
        rank = adapted.peft_config[POLICY].r
        room = next((each for each in RANKS if rank <= each), None)
        if room is None:
            raise RunError(f"vLLM takes adapters of rank {RANKS[-1]} at most, not {rank}")
        words = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(room)]
        return str(unwrap(model).config._name_or_path), words

    def send(
        self, model: nn.Module, servers: Sequence[Server], label: str, device: torch.device
    ) -> None:
        """Write it once, and have each server put it in the place of the one before."""
        self._check(model)
        folder = self._folder / label
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            save_model(model, self._encoder.tokenizer, part, False, product_type_of(model))
        try_each(servers, lambda server: self._load(server, folder, label), folder)

    def is_there(self, server: Server, label: str) -> bool:
        """Whether it lists the adapter of that name."""
        return label in [each["id"] for each in server.client.get("/v1/models")["data"]]

    def name_for(self, server: Server, label: str) -> str:
        """That of the adapter."""
        return label

    def _load(self, server: Server, folder: Path, label: str) -> None:
        body = {"lora_name": label, "lora_path": str(folder), "load_inplace": True}
        try:
            server.client.tell("/v1/load_lora_adapter", body)
        except ServerFault as fault:
            if fault.status != 404:
                raise
            raise RunError(
                f"{fault}; adapters are given to a server that was started with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            ) from None
        if (last := self._last.get(server.url)) not in (None, label):
            with suppress(ServerFault):  # one that was started anew has it no more
                server.client.tell("/v1/unload_lora_adapter", {"lora_name": last}, tries=1)
            remove([self._folder / str(last)])
        self._last[server.url] = label

    def _check(self, model: nn.Module) -> None:
        """Raise for an adapter that vLLM cannot put on the base that a folder or the hub holds."""
        adapted: Any = model
        fault = None
        if not is_adapted(model):
            fault = "the policy has no adapter (model=lora gives it one)"
        elif below(model) or not base_is_as_stored(adapted):
            fault = "the policy's adapter stands on a base that no folder holds"
        else:
            config = adapted.peft_config[POLICY]
            named = {"use_dora": config.use_dora, "modules_to_save": config.modules_to_save}
            named["trainable_token_indices"] = config.trainable_token_indices
            if has := [name for name, value in named.items() if value]:
                fault = f"the policy's adapter has {has[0]}, which vLLM does not take"
        if fault is not None:
            raise RunError(
                f"hardware.rollout_sync=adapter: {fault}; set hardware.rollout_sync=files"
            )


def try_each(servers: Sequence[Server], load: Callable[[Server], None], folder: Path) -> None:
    """Have all servers load, each a few times where it answers with faults.

    Raises:
        RunError: one does not; it is left paused, so that nobody draws from half of the weights.
    """
    clients = [server.client for server in servers]
    for _ in each_of(clients, lambda _, server: _persistently(server, load, folder), servers):
        pass


def _persistently(server: Server, load: Callable[[Server], None], folder: Path) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            load(server)
            return
        except ServerFault as fault:
            if fault.status == 404:
                raise RunError(
                    f"{fault}; weights are given to a server that was started with "
                    "VLLM_SERVER_DEV_MODE=1"
                ) from None
            if attempt == ATTEMPTS:
                raise RunError(
                    f"the weights in {folder}, which the server must see by this path, were not "
                    f"loaded: {fault}; it may stay paused"
                ) from None
            say(f"{fault}; weights are given to it once more")
