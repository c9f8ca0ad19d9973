"""vLLM servers, the weights that they run, and the proof that these are the newest.

Each update goes to all servers (server_sync.py). They then bear a label that no other weights have,
and that a server which was started anew has not. Rank 0 asks them, and every rank knows what they
said.
"""

import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.files import remove
from rlhf_cli.models.assembled import assembled
from rlhf_cli.models.decoder import embedding_rows
from rlhf_cli.models.dtypes import name_of, product_type_of
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server_client import Client, each_of
from rlhf_cli.rollout.server_nccl import NcclSync
from rlhf_cli.rollout.server_process import LOG, WANTED, ServerProcess, end_others, too_old
from rlhf_cli.rollout.server_proof import LIMIT, TEMPERATURE, Sample, Scores, fault_of
from rlhf_cli.rollout.server_sync import AdapterSync, FileSync, Server, Sync
from rlhf_cli.rollout.server_terms import completion_of, request_of, scores_of, scoring_request

Value = TypeVar("Value")

WAYS: dict[str, type[Sync]] = {"files": FileSync, "nccl": NcclSync, "adapter": AdapterSync}
PROBE_PROMPT, PROBE_SAMPLE = 64, 16  # tokens; vLLM keeps prompts in blocks of 16


class Served:
    """Servers that run, or one of the stage's own, with the weights of a policy.

    servers: of rank 0, once they are connected.
    urls: where they are, on every rank.
    longest: tokens that all of them take for one sequence; 0 where none says.
    """

    servers: list[Server]
    urls: list[str]
    longest: int

    def __init__(
        self, encoder: Encoder, hardware: Hardware, folder: Path, changes: bool, trusts: bool
    ) -> None:
        """
        Args:
            folder: for weights and the log, which servers see by the same path.
            changes: whether servers that run are given other weights; else they have to have those
                of the policy already.
            trusts: whether code that the model brings along may run.
        """
        self._encoder, self._hardware, self._trusts = encoder, hardware, trusts
        self._folder = folder.resolve()
        self._own = hardware.rollout_server is None
        self._changes = changes or self._own
        self._sync = WAYS[hardware.rollout_sync](self._folder, encoder)
        self._run = secrets.token_hex(4)  # the label of another run is not ours
        self._version = 0
        self._prompt: list[int] = []  # of the probe
        self._scored: list[int] = []  # that, with what the first server once said to it
        self._before: dict[int, Scores] = {}  # of the weights before, by the place of a server
        self._connected = False

    @property
    def label(self) -> str:
        """Of the newest weights, whose versions count up."""
        return f"rlhf-cli-{self._run}-{self._version:08d}"

    def named(self, server: Server, request: dict[str, Any]) -> dict[str, Any]:
        """A request with its model; what is cached of it serves requests with this label alone."""
        name = self._sync.name_for(server, self.label) if self._changes else server.name
        return {"model": name, "cache_salt": self.label, **request}

    def bring_up_to_date(self, model: nn.Module, prompts: Sequence[list[int]], stale: bool) -> None:
        """Connect where that was not done; then all have the weights of the model, proven.

        Args:
            prompts: that will be sampled from; the first ones are the probe.
            stale: whether the model has others than they were given last, or one lost them.

        Raises:
            RunError: there is no server that will do, or one does not take them, or runs others.
        """
        if self._connected and stale:
            self._give(model)
        elif not self._connected:
            by_main(partial(self._begin, device_of(model)))
            with assembled(model) if self._own else nullcontext():
                self.urls, self.longest = by_main(lambda: self._find(model))
            self._prompt = self._probe_of(model, prompts)
            self._connected = True
            if self._changes and not (self._own and self._sync.starts_up_to_date):
                self._give(model)
            else:
                self._prove(model)

    def have_lost(self) -> list[int]:
        """The places of servers that have not the weights which they were given last: for rank 0,
        which asks them.
        """
        kept = self._of_each(self._is_there)
        return [place for place, each in enumerate(kept) if not each]

    def _is_there(self, server: Server) -> bool:
        if self._changes:
            return self._sync.is_there(server, self.label)
        before = self._before[self.servers.index(server)]
        now = torch.tensor(self._scores(server))
        return float((now - before.served).abs().mean()) <= LIMIT

    def _of_each(self, work: Callable[[Server], Value]) -> list[Value]:
        """What `work` gives of each server, which are asked side by side."""
        clients = [server.client for server in self.servers]
        found = dict(each_of(clients, lambda _, server: work(server), self.servers))
        return [found[place] for place in range(len(self.servers))]

    # ------------------------------------------------------------------ connection

    def _begin(self, device: torch.device) -> None:
        """No weights of a part of the run before, and GPUs that are free for a server."""
        if self._own:
            assert self._hardware.rollout_devices is not None  # config/rollout_rules.py
            _check_devices(self._hardware.rollout_devices, device)
            end_others()
        remove([self._folder])

    def _find(self, model: nn.Module) -> list[Any]:
        """Connect to the servers: their addresses, and the longest sequence that all take."""
        timeout = self._hardware.rollout_timeout
        if self._own:
            process = self._started(model)
            self.servers = [Server(Client(process.url, timeout, process.alive, starts=True))]
        else:
            self.servers = [Server(Client(url, timeout)) for url in urls_of(self._hardware)]
        versions = self._of_each(_introduced)
        if self._own and self._sync.starts_up_to_date:
            self.servers[0].client.post("/update_weight_version", {"new_version": self.label})
        for server, version in zip(self.servers, versions, strict=True):
            say(f"rollouts: vLLM {version} at {server.url}")
        limits = [server.longest for server in self.servers if server.longest]
        return [[server.url for server in self.servers], min(limits, default=0)]

    def _started(self, model: nn.Module) -> ServerProcess:
        """A server of the model's weights, or of its base, on the devices that are named."""
        devices = self._hardware.rollout_devices
        assert devices is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        start, further = self._sync.start(model, self._folder / self.label)
        words = ["--served-model-name", "policy", "--max-model-len", "auto"]
        words += ["--dtype", name_of(product_type_of(model)), "--seed", "0"]
        words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        words += ["--trust-remote-code"] if self._trusts else []
        process = ServerProcess(start, devices, self._folder, [*words, *further])
        gpus = ", ".join(map(str, devices))
        say(f"rollouts: vllm serve starts on GPU {gpus}; its log: {self._folder / LOG}")
        return process

    # ------------------------------------------------------------------ weights

    def _give(self, model: nn.Module) -> None:
        """Have all servers take the model's weights, and prove that they did."""
        self._version += 1
        device = device_of(model)
        with assembled(model, self._sync.adapter_alone):
            by_main(lambda: self._sync.send(model, self.servers, self.label, device))
        self._prove(model)

    # ------------------------------------------------------------------ proof

    def _probe_of(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[int]:
        """The first prompts, each once, one after the other, as far as there is room for them."""
        limits = [each for each in (self.longest, positions_of(model)) if each]
        room = min([PROBE_PROMPT, *(each - PROBE_SAMPLE - 1 for each in limits)])
        if room < 1:
            raise RunError(
                f"{', '.join(self.urls)} takes {self.longest} tokens of a sequence: too few"
            )
        joined: list[int] = []
        for ids in dict.fromkeys(map(tuple, prompts)):
            joined += ids
            if len(joined) >= room:
                break
        return joined[:room]

    def _asked(self, server: Server) -> list[Any]:
        """The ids and log-probs of a sample after the probe's prompt."""
        sampling = Sampling(PROBE_SAMPLE, TEMPERATURE)
        request = self.named(server, request_of(self._prompt, 0, sampling, []))
        answer = server.client.post("/v1/completions", request)
        drawn = completion_of(answer, sampling, [], self._vocabulary)
        return [drawn.ids, drawn.logprobs]

    def _scores(self, server: Server) -> list[float]:
        request = self.named(server, scoring_request(self._scored))
        return scores_of(server.client.post("/v1/completions", request), self._scored)

    def _answers(self) -> list[Any]:
        """What each server says to the probe, and how it scores the sequence of the probe."""
        drawn = self._of_each(self._asked)
        self._scored = self._scored or [*self._prompt, *drawn[0][0]]
        return [drawn, self._scored, self._of_each(self._scores)]

    def _faults(self, model: nn.Module) -> list[str | None]:
        """What is wrong with each server's weights, beside those of the model; None: nothing."""
        self._vocabulary = embedding_rows(model)
        drawn, self._scored, scores = by_main(self._answers)
        fixed = Tokens(self._scored[:1], self._scored[1:])
        samples = [Tokens(self._prompt, ids) for ids, _ in drawn]
        own, *plain = logprobs_of(model, [fixed, *samples], self._hardware)
        warm = logprobs_of(model, samples, self._hardware, TEMPERATURE)
        faults: list[str | None] = []
        for place, (_, logprobs) in enumerate(drawn):
            found = Scores(torch.tensor(scores[place]), own)
            sample = Sample(torch.tensor(logprobs), warm[place], plain[place])
            faults.append(fault_of(found, sample, self._before.get(place)))
            self._before[place] = found
        return faults

    def _prove(self, model: nn.Module) -> None:
        """All servers run the weights of the model, which then need lie on disk no longer.

        Raises:
            RunError: one does not, with the version and how far it is from them.
        """
        for url, fault in zip(self.urls, self._faults(model), strict=True):
            if fault is not None and not self._changes:
                raise RunError(
                    f"{url} does not serve this policy: {fault}. Start it as `vllm serve POLICY`, "
                    "or give hardware.rollout_devices, where each policy has a server of its own"
                )
            if fault is not None:
                raise RunError(
                    f"{url} does not run the weights of version {self._version}, which it was "
                    f"given: {fault}"
                )
        if self._changes and world().is_main:
            self._sync.tidy(self.label)


def urls_of(hardware: Hardware) -> list[str]:
    """The addresses of servers that run."""
    given = hardware.rollout_server
    return [given] if isinstance(given, str) else list(given)


def _introduced(server: Server) -> str:
    """Learn what a server says of itself; returns its version."""
    client = server.client
    client.get("/health")
    try:
        version = str(client.get("/version")["version"])
        served = client.get("/v1/models")["data"][0]
        server.name, server.longest = str(served["id"]), int(served.get("max_model_len") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise RunError(f"{client.url} says no version or no model: is it a vLLM server?") from None
    if too_old(version):
        raise RunError(f"{client.url} is vLLM {version}, and {WANTED} is needed")
    return version


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, also one whose weights are about to be put together elsewhere."""
    return next(model.parameters()).device


def _check_devices(devices: Sequence[int], own: torch.device) -> None:
    """GPUs are there, and nothing of the stage is computed on them.

    Args:
        own: the device of this rank.

    Raises:
        RunError: naming the first that is not.
    """
    if own.type != "cuda":
        return
    taken = range(world().local_size) if world().size > 1 else [own.index or 0]
    for each in devices:
        if each >= torch.cuda.device_count():
            raise RunError(f"hardware.rollout_devices names GPU {each}, which is not there")
        if each in taken:
            raise RunError(
                f"hardware.rollout_devices names GPU {each}, on which the stage itself computes"
            )
