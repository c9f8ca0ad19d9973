"""Rules of sampling by a vLLM server: who may, where it is, which options mean the same there."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from rlhf_cli.config.schema.algorithms import Decoding
from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.config.schema.models import Model
from rlhf_cli.config.schema.stages import OnlineConfig, Run, SamplingConfig

COLDEST = 0.01  # vLLM raises a lower temperature to this


def rollout_rules(cfg: Run) -> Iterator[str]:
    """Complaints about hardware.rollout=vllm."""
    hardware = cfg.hardware
    if hardware.rollout != VLLM:
        return
    if not isinstance(cfg, OnlineConfig | SamplingConfig):
        yield "hardware.rollout=vllm is for ppo, grpo, generate and evaluate; set it to native"
    if (hardware.rollout_server is None) == (hardware.rollout_devices is None):
        yield (
            "hardware.rollout=vllm needs hardware.rollout_server=http://HOST:PORT, a server that "
            "runs, or hardware.rollout_devices=[1], where the stage starts one: give one of them"
        )
    yield from _addresses(hardware.rollout_server)
    devices = hardware.rollout_devices
    if devices is not None and (not devices or len({*devices}) < len(devices) or min(devices) < 0):
        yield f"hardware.rollout_devices={devices} must name each GPU once, by its number"
    if isinstance(cfg.model, Model) and cfg.model.quantize is not None:
        yield (
            f"model.quantize={cfg.model.quantize} has no whole weights to give to a vLLM server: "
            "set hardware.rollout=native"
        )
    yield from _sync(cfg)
    yield from _temperatures(cfg)
    if isinstance(cfg.algo, Decoding):
        yield from _decoding(cfg.algo)


def _addresses(given: str | list[str] | None) -> Iterator[str]:
    urls = given if isinstance(given, list) else [given] if given is not None else []
    for url in urls:
        yield from _address(url)
    named = [url.rstrip("/") for url in urls]
    if twice := next((url for url in named if named.count(url) > 1), None):
        yield f"hardware.rollout_server names {twice} twice"


def _address(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number
        known = None
    if not known:
        yield f"hardware.rollout_server={url} is no address; give one as http://127.0.0.1:8000"
    elif parts.username is not None:
        yield "hardware.rollout_server holds a password: the variable VLLM_API_KEY is for keys"
    elif parts.query or parts.fragment or parts.path.rstrip("/").endswith("/v1"):
        yield f"hardware.rollout_server={url} must end before /v1 or ?, as http://127.0.0.1:8000"


def _sync(cfg: Run) -> Iterator[str]:
    way, model = cfg.hardware.rollout_sync, cfg.model
    if way == "files":
        return
    if not isinstance(cfg, OnlineConfig):
        yield f"hardware.rollout_sync={way} is for ppo and grpo, which give a server new weights"
    elif way == "nccl" and cfg.hardware.device == "cpu":
        yield "hardware.rollout_sync=nccl goes from GPU to GPU; on a CPU set it to files"
    elif way == "adapter" and isinstance(model, Model) and not model.lora_rank:
        yield "hardware.rollout_sync=adapter is for model=lora; set hardware.rollout_sync=files"
    elif way == "adapter" and isinstance(model, Model) and model.use_dora:
        yield "hardware.rollout_sync=adapter: vLLM has no DoRA; set hardware.rollout_sync=files"


def _temperatures(cfg: Run) -> Iterator[str]:
    for name in ("temperature", "temperature_end", "temperatures"):
        given = getattr(cfg.algo, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is None or not 0 < value < COLDEST:
                continue
            yield (
                f"algo.{name}={value:g}: vLLM samples at {COLDEST:g} or above; take that, or 0, "
                "which is greedy"
            )


def _decoding(algo: Decoding) -> Iterator[str]:
    if algo.beams > 1:
        yield f"algo.beams={algo.beams} is for hardware.rollout=native; vLLM searches otherwise"
    if algo.stop and algo.min_tokens:
        yield (
            f"algo.stop and algo.min_tokens={algo.min_tokens}: vLLM looks for no string before so "
            "many tokens, rlhf-cli does; give one of them, or hardware.rollout=native"
        )
    if algo.min_p > 0 and algo.top_p < 1:
        yield (
            f"algo.top_p={algo.top_p:g} and algo.min_p={algo.min_p:g}: vLLM cuts by min_p first, "
            "rlhf-cli by top_p; give one of them, or hardware.rollout=native"
        )
