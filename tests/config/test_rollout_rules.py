"""What is refused of hardware.rollout=vllm, in one line."""

import copy
from typing import Any

import pytest
import yaml

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.validate import validate
from tests.toys import composed

URL = "hardware.rollout_server=http://127.0.0.1:8000"
VLLM = ["hardware.rollout=vllm", URL]


def config_of(stage: str, words: list[str]) -> Any:
    """A stage's config with values put into it."""
    cfg = copy.deepcopy(composed(stage))
    for word in words:
        key, _, value = word.partition("=")
        group, _, name = key.partition(".")
        setattr(getattr(cfg, group), name, yaml.safe_load(value))
    return cfg


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("sft", VLLM, "is for ppo, grpo, generate and evaluate; set it to native"),
        ("grpo", ["hardware.rollout=vllm"], "give one of them"),
        ("grpo", [*VLLM, "hardware.rollout_devices=[1]"], "give one of them"),
        ("grpo", [URL], "hardware.rollout_server is not used by hardware.rollout=native"),
        ("ppo", ["hardware.rollout_timeout=5.0"], "hardware.rollout_timeout is not used by"),
        ("ppo", [*VLLM, "hardware.rollout_timeout=0.0"], "hardware.rollout_timeout must be"),
        ("ppo", ["hardware.rollout=sglang"], "must be native|vllm, got sglang"),
        *(
            ("ppo", ["hardware.rollout=vllm", f"hardware.rollout_server={url}"], message)
            for url, message in [
                ("localhost:8000", "is no address"),
                ("http://host:port", "is no address"),
                ("ftp://host", "is no address"),
                ("http://me:word@host", "holds a password: the variable VLLM_API_KEY"),
                ("http://host:8000/v1", "must end before /v1"),
            ]
        ),
        *(
            ("ppo", ["hardware.rollout=vllm", f"hardware.rollout_devices={each}"], "each GPU once")
            for each in ("[]", "[1,1]", "[-1]")
        ),
        (
            "grpo",
            [*VLLM, "model.quantize=nf4", "model.lora_rank=2", "model.merge_lora=false"],
            "has no whole weights to give",
        ),
        (
            "ppo",
            ["hardware.rollout=vllm", "hardware.rollout_server=[http://a,http://a/]"],
            "hardware.rollout_server names http://a twice",
        ),
        (
            "ppo",
            ["hardware.rollout=vllm", "hardware.rollout_server=[http://a,b:1]"],
            "rollout_server=b:1 is no address",
        ),
        ("ppo", ["hardware.rollout_sync=nccl"], "hardware.rollout_sync is not used by"),
        ("ppo", [*VLLM, "hardware.rollout_sync=disk"], "must be files|nccl|adapter"),
        ("generate", [*VLLM, "hardware.rollout_sync=nccl"], "is for ppo and grpo, which give"),
        (
            "grpo",
            [*VLLM, "hardware.rollout_sync=nccl", "hardware.device=cpu"],
            "on a CPU set it to files",
        ),
        ("grpo", [*VLLM, "hardware.rollout_sync=adapter"], "is for model=lora"),
        (
            "grpo",
            [*VLLM, "hardware.rollout_sync=adapter", "model.lora_rank=2", "model.use_dora=true"],
            "vLLM has no DoRA",
        ),
        ("grpo", [*VLLM, "algo.temperature=0.005"], "vLLM samples at 0.01 or above"),
        ("grpo", [*VLLM, "algo.temperature_end=0.001"], "algo.temperature_end=0.001: vLLM"),
        ("evaluate", [*VLLM, "algo.temperatures=[0.7,0.002]"], "algo.temperatures=0.002: vLLM"),
        ("generate", [*VLLM, "algo.beams=3", "algo.temperature=1.0"], "vLLM searches otherwise"),
        ("generate", [*VLLM, "algo.top_p=0.9", "algo.min_p=0.1"], "vLLM cuts by min_p first"),
        ("evaluate", [*VLLM, "algo.stop=[x]", "algo.min_tokens=2"], "vLLM looks for no string"),
    ],
)
def test_refused(stage: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(stage, config_of(stage, words))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "generate", "evaluate"])
def test_taken(stage: str) -> None:
    validate(stage, config_of(stage, [*VLLM, "algo.temperature=0.7"]))
    cfg = compose(stage, ["hardware.rollout=vllm", "hardware.rollout_devices=[2,3]"])
    assert cfg.hardware.rollout_devices == [2, 3] and cfg.hardware.rollout_timeout == 600
    several = compose(stage, [VLLM[0], "hardware.rollout_server=[http://a:8000,http://b:8000]"])
    assert several.hardware.rollout_server == ["http://a:8000", "http://b:8000"]
