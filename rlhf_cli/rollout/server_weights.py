"""A vLLM server, the weights that it runs, and the proof that these are the newest.

Weights go by files: each update is written as safetensors into a folder of its own, which the
server loads by `reload_weights`, between a pause and the reset of its prefix cache. It then bears a
label that no other weights have, and that a server which was started anew has not. Rank 0 asks it,
and every rank knows what it said.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Hardware
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.files import remove, whole_folder
from rlhf_cli.models.assembled import assembled
from rlhf_cli.models.decoder import embedding_rows, unwrap
from rlhf_cli.models.dtypes import name_of, product_type_of
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.save import save_tokenizer, save_working
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server_client import Client, ServerFault
from rlhf_cli.rollout.server_process import LOG, WANTED, ServerProcess, end_others, too_old
from rlhf_cli.rollout.server_proof import LIMIT, TEMPERATURE, Sample, Scores, fault_of
from rlhf_cli.rollout.server_terms import completion_of, request_of, scores_of, scoring_request

Value = TypeVar("Value")

ATTEMPTS = 3  # to give weights to a server that answers with faults
RESETS, PAUSE = 5, 0.5  # of a prefix cache that is still held, and seconds between them
PROBE_PROMPT, PROBE_SAMPLE = 64, 16  # tokens; vLLM keeps prompts in blocks of 16


class Served:
    """A server that runs, or one of the stage's own, with the weights of a policy.

    client: of rank 0, once it is connected.
    longest: tokens that the server takes for one sequence; 0 where it does not say.
    """

    client: Client
    longest: int

    def __init__(
        self, encoder: Encoder, hardware: Hardware, folder: Path, changes: bool, trusts: bool
    ) -> None:
        """
        Args:
            folder: for weights and the log, which the server sees by the same path.
            changes: whether a server that runs is given other weights; else it has to have those
                of the policy already.
            trusts: whether code that the model brings along may run.
        """
        self._encoder, self._hardware, self._trusts = encoder, hardware, trusts
        self._folder = folder.resolve()
        self._own = hardware.rollout_server is None
        self._changes = changes or self._own
        self._run = secrets.token_hex(4)  # the label of another run is not ours
        self._version = 0
        self._name = self._url = ""
        self._prompt: list[int] = []  # of the probe
        self._scored: list[int] = []  # that, with what the server once said to it
        self._before: Scores | None = None
        self._connected = False

    @property
    def label(self) -> str:
        """Of the newest weights, whose versions count up."""
        return f"rlhf-cli-{self._run}-{self._version:08d}"

    def named(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request with its model; what is cached of it serves requests with this label alone."""
        return {"model": self._name, "cache_salt": self.label, **request}

    def bring_up_to_date(self, model: nn.Module, prompts: Sequence[list[int]], stale: bool) -> None:
        """Connect where that was not done; then the server has the weights of the model, proven.

        Args:
            prompts: that will be sampled from; the first ones are the probe.
            stale: whether the model has others than the server was given last, or it lost them.

        Raises:
            RunError: there is no server that will do, or it does not take them, or runs others.
        """
        if self._connected and stale:
            self._give(model)
        elif not self._connected:
            on_main(self._begin)
            if self._own:
                self._write(model)
            self._url, self._name, self.longest = on_main(lambda: self._find(model))
            self._prompt = self._probe_of(model, prompts)
            self._connected = True
            if self._changes and not self._own:
                self._give(model)
            else:
                self._prove(model)

    def still_there(self) -> bool:
        """Whether the server has the weights that it was given last: rank 0 asks."""
        if self._changes:
            return bool(self.client.get("/weight_info")["weight_version"] == self.label)
        assert self._before is not None
        now = torch.tensor(self._scores())
        return float((now - self._before.served).abs().mean()) <= LIMIT

    # ------------------------------------------------------------------ connection

    def _find(self, model: nn.Module) -> list[Any]:
        """The server's address, its name of the model and the longest sequence that it takes."""
        url, timeout = self._hardware.rollout_server, self._hardware.rollout_timeout
        if url is None:
            process = self._started(model)
            self.client = Client(process.url, timeout, process.alive, starts=True)
        else:
            self.client = Client(url, timeout)
        self.client.get("/health")
        try:
            version = str(self.client.get("/version")["version"])
            served = self.client.get("/v1/models")["data"][0]
            name, longest = str(served["id"]), int(served.get("max_model_len") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            url = self.client.url
            raise RunError(f"{url} says no version or no model: is it a vLLM server?") from None
        if too_old(version):
            raise RunError(f"{self.client.url} is vLLM {version}, and {WANTED} is needed")
        if self._own:
            self.client.post("/update_weight_version", {"new_version": self.label})
        say(f"rollouts: vLLM {version} at {self.client.url}")
        return [self.client.url, name, longest]

    def _started(self, model: nn.Module) -> ServerProcess:
        """A server of the model's weights."""
        devices = self._hardware.rollout_devices
        assert devices is not None  # config/rollout_rules.py
        _check_devices(devices, model)
        folder = self._folder_of(self._version)
        save_tokenizer(self._encoder.tokenizer, folder)
        for name, content in getattr(unwrap(model), "processors", {}).items():
            (folder / name).write_bytes(content)
        words = ["--served-model-name", "policy", "--max-model-len", "auto"]
        words += ["--dtype", name_of(product_type_of(model)), "--seed", "0"]
        words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        words += ["--trust-remote-code"] if self._trusts else []
        process = ServerProcess(folder, devices, self._folder, words)
        gpus = ", ".join(map(str, devices))
        say(f"rollouts: vllm serve starts on GPU {gpus}; its log: {self._folder / LOG}")
        return process

    # ------------------------------------------------------------------ weights

    def _folder_of(self, version: int) -> Path:
        return self._folder / f"v{version:08d}"

    def _begin(self) -> None:
        """No weights of a part of the run before, and GPUs that the server before has left."""
        if self._own:
            end_others()
        remove([self._folder])

    def _write(self, model: nn.Module) -> None:
        """The weights of the model in the folder of the newest version."""

        def write() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_folder(self._folder_of(self._version)) as folder:
                save_working(model, folder, product_type_of(model))

        with assembled(model):
            on_main(write)

    def _give(self, model: nn.Module) -> None:
        """Write the model's weights, have the server load them, and prove that it did."""
        self._version += 1
        self._write(model)
        on_main(self._persistently_loaded)
        self._prove(model)

    def _persistently_loaded(self) -> None:
        """`_loaded`, a few times where the server answers with faults.

        Raises:
            RunError: it does not; it is left paused, so that nobody draws from half of them.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._loaded()
            except ServerFault as fault:
                if fault.status == 404:
                    raise RunError(
                        f"{fault}; weights are given to a server that was started with "
                        "VLLM_SERVER_DEV_MODE=1"
                    ) from None
                if attempt == ATTEMPTS:
                    raise RunError(
                        f"the weights of version {self._version} in "
                        f"{self._folder_of(self._version)}, which the server must see by this "
                        f"path, were not loaded: {fault}; it may stay paused"
                    ) from None
                say(f"{fault}; weights are given to it once more")
        raise AssertionError("unreachable")

    def _loaded(self) -> None:
        """Pause, load, label, forget what was cached, resume.

        In this order: nothing is drawn from half of the weights, nor from the new ones with keys
        and values of the old.
        """
        client, timeout = self.client, self._hardware.rollout_timeout
        client.post("/pause?mode=wait")
        kwargs = {"weights_path": str(self._folder_of(self._version))}
        load = {"method": "reload_weights", "kwargs": kwargs, "timeout": timeout}
        client.post("/collective_rpc", load, tries=1)
        client.post("/update_weight_version", {"new_version": self.label})
        for _ in range(RESETS):
            if client.post("/reset_prefix_cache")["success"]:
                break
            time.sleep(PAUSE)
        else:
            raise ServerFault(f"{client.url} does not reset its prefix cache")
        client.post("/resume")
        if not self.still_there():
            raise ServerFault(f"{client.url} has lost the label of the weights that it was given")

    def _tidy(self) -> None:
        """Remove weights that the server has read; what else lies beside the first ones stays."""
        for version in range(self._version + 1):
            folder = self._folder_of(version)
            remove(folder.glob("*.safetensors*") if version == 0 else [folder])

    # ------------------------------------------------------------------ proof

    def _probe_of(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[int]:
        """The first prompts, each once, one after the other, as far as there is room for them."""
        limits = [each for each in (self.longest, positions_of(model)) if each]
        room = min([PROBE_PROMPT, *(each - PROBE_SAMPLE - 1 for each in limits)])
        if room < 1:
            raise RunError(f"{self._url} takes {self.longest} tokens of a sequence: too few")
        joined: list[int] = []
        for ids in dict.fromkeys(map(tuple, prompts)):
            joined += ids
            if len(joined) >= room:
                break
        return joined[:room]

    def _asked(self) -> list[Any]:
        """The ids and log-probs of a sample after the probe's prompt; the scores of the probe."""
        sampling = Sampling(PROBE_SAMPLE, TEMPERATURE)
        request = self.named(request_of(self._prompt, 0, sampling, []))
        answer = self.client.post("/v1/completions", request)
        drawn = completion_of(answer, sampling, [], self._vocabulary)
        self._scored = self._scored or [*self._prompt, *drawn.ids]
        return [drawn.ids, drawn.logprobs, self._scored, self._scores()]

    def _scores(self) -> list[float]:
        request = self.named(scoring_request(self._scored))
        return scores_of(self.client.post("/v1/completions", request), self._scored)

    def _proof(self, model: nn.Module) -> str | None:
        """What is wrong with the server's weights, beside those of the model; None: nothing."""
        self._vocabulary = embedding_rows(model)
        ids, logprobs, self._scored, scores = on_main(self._asked)
        fixed, drawn = Tokens(self._scored[:1], self._scored[1:]), Tokens(self._prompt, ids)
        own, plain = logprobs_of(model, [fixed, drawn], self._hardware)
        (warm,) = logprobs_of(model, [drawn], self._hardware, TEMPERATURE)
        found = Scores(torch.tensor(scores), own)
        fault = fault_of(found, Sample(torch.tensor(logprobs), warm, plain), self._before)
        if fault is None:
            self._before = found
        return fault

    def _prove(self, model: nn.Module) -> None:
        """The server runs the weights of the model, which then need lie on disk no longer.

        Raises:
            RunError: it does not, with the version and how far it is from them.
        """
        fault = self._proof(model)
        if fault is not None and not self._changes:
            raise RunError(
                f"{self._url} does not serve this policy: {fault}. Start it as `vllm serve POLICY`,"
                " or give hardware.rollout_devices, where each policy has a server of its own"
            )
        if fault is not None:
            raise RunError(
                f"{self._url} does not run the weights of version {self._version}, which it was "
                f"given: {fault}"
            )
        if world().is_main:
            self._tidy()


def on_main(work: Callable[[], Value]) -> Value:
    """What rank 0 finds, a value of JSON, on every rank.

    Raises:
        RunError: a server did not do what it was asked for; on every rank, too.
    """

    def told() -> Value:
        try:
            return work()
        except ServerFault as fault:
            raise RunError(str(fault)) from None

    return by_main(told)


def _check_devices(devices: Sequence[int], model: nn.Module) -> None:
    """GPUs are there, and nothing of the stage is computed on them.

    Raises:
        RunError: naming the first that is not.
    """
    own = next(model.parameters()).device
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
