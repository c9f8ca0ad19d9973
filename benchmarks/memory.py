"""Peak memory of PPO and GRPO in each arrangement of their roles, beside the predicted one.

    python benchmarks/memory.py [FOLDER] [--only TEXT]

A random Llama of about 60M parameters is the policy; the reward model is its trunk with a random
head, once with all weights and once as an adapter on the policy's base. Each arrangement runs one
iteration of two updates in a process of its own. `measured` is the most that was resident at once
(VmHWM), less what was resident once the stage's libraries were imported, with an allocator that
gives freed tensors back (--allocator default: as it comes); `predicted` is what `--check` prints.
Linux with glibc only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.config.compose import compose
from rlhf_cli.config.schema.models import Model
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.rows import read_split
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scorers import scorer_from_policy
from rlhf_cli.models.scratch import learn_tokenizer
from rlhf_cli.runs.memory_estimate import parts_of, predicted_peak

SIZE: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MIB = 2**20
SETTINGS = [
    *("data=jsonl", "data.path=prompts.jsonl", "data.eval_rows=4", "data.max_prompt_tokens=64"),
    *("data.max_response_tokens=96", "algo.steps=1", "algo.epochs=2", "algo.show_every=99"),
    *("hardware.tokens_per_microbatch=1024", "hardware.rollout_tokens=4096", "hardware.device=cpu"),
    *("hardware.threads=1", "hardware.save_every=null", "overwrite=true"),
]
PPO = ["ppo", *SETTINGS, "algo.batch_size=16", "algo.minibatch_size=16"]
GRPO = ["grpo", *SETTINGS, "algo.batch_size=4", "algo.minibatch_size=4", "algo.group_size=4"]
LONG = ["data.max_response_tokens=448"]
LORA = ["model=lora", "model.lora_rank=16"]
ARRANGEMENTS: dict[str, list[str]] = {
    "ppo, all weights, separate critic": [*PPO, "reward=reward"],
    "ppo, all weights, shared critic": [*PPO, "reward=reward", "algo.critic=shared"],
    "ppo, upper 6 of 12 blocks, separate critic": [*PPO, "reward=reward", "model.frozen_layers=6"],
    "ppo, upper 6 of 12 blocks, shared critic": [
        *(*PPO, "reward=reward", "model.frozen_layers=6", "algo.critic=shared")
    ],
    "ppo, LoRA, reward and critic of their own": [*PPO, *LORA, "reward=reward"],
    "ppo, LoRA, four roles on one base": [*PPO, *LORA, "reward=adapter"],
    "ppo, LoRA, four roles, recomputing": [
        *(*PPO, *LORA, "reward=adapter", "hardware.gradient_checkpointing=true")
    ],
    "ppo, LoRA, three roles, shared critic": [*PPO, *LORA, "reward=adapter", "algo.critic=shared"],
    "grpo, all weights": [*GRPO, "reward=reward"],
    "grpo, responses of 448 tokens": [*GRPO, "reward=reward", *LONG],
    "grpo, responses of 448 tokens, eager": [
        *(*GRPO, "reward=reward", *LONG, "model.attention=eager")
    ],
    "grpo, LoRA, own reward model": [*GRPO, *LORA, "reward=reward"],
    "grpo, LoRA, three roles on one base": [*GRPO, *LORA, "reward=adapter"],
}


def make_models(folder: Path) -> None:
    """A policy, a reward model with all weights, and one that is an adapter on the policy."""
    rows = read_split(compose("ppo", ["data=demo"]).data, Prompt).train
    prompts = [str(row.prompt) for row in rows]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts[:64]]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = learn_tokenizer(prompts, 512)
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    policy = LlamaForCausalLM(LlamaConfig(**SIZE, **ends))
    save_model(policy, tokenizer, folder / "policy", merge=True)
    plain: Model = compose("dpo", ["data=demo"]).model
    for name, rank in (("reward", 0), ("adapter", 16)):
        config = replace(plain, lora_rank=rank, lora_alpha=32.0, merge_lora=rank == 0)
        cpu = torch.device("cpu")
        scorer = scorer_from_policy(str(folder / "policy"), config, tokenizer, 1, cpu)
        save_model(scorer, tokenizer, folder / name, merge=rank == 0)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def measure(stage: str, words: list[str]) -> None:
    """Run a stage in this process; print its peak and the predicted one, in MiB."""
    import importlib

    run = importlib.import_module(f"rlhf_cli.stages.{stage}").run
    cfg = compose(stage, [*words, "policy=policy", "out=out"])
    import peft  # noqa: F401  (what LoRA imports later is no memory of the run)

    start = resident("VmRSS")
    run(cfg)
    always = parts_of(cfg)[0]
    weights = sum(size for name, size in always.items() if name.startswith("weights"))
    found = {
        "weights": weights / MIB,
        "predicted": predicted_peak(cfg) / MIB,
        "measured": resident("VmHWM") - start,
    }
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="where models are made; default: a temporary one")
    parser.add_argument("--only", default="", help="arrangements whose name contains this")
    parser.add_argument("--allocator", choices=("returning", "default"), default="returning")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.measure[1:])
        return
    # glibc keeps freed blocks of up to 32 MiB, in pieces; those over this limit it gives back
    limit = {} if options.allocator == "default" else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "adapter").is_dir():
            make_models(folder)
        print("| arrangement | weights, MiB | predicted peak | measured peak | ratio |")
        print("| --- | ---: | ---: | ---: | ---: |", flush=True)
        for name, words in ARRANGEMENTS.items():
            if options.only not in name:
                continue
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", *words]
            done = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, **limit}
            )
            if done.returncode:
                print(f"| {name} | failed | | | |", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["measured"] / found["predicted"]
            cells = " | ".join(f"{found[key]:.0f}" for key in ("weights", "predicted", "measured"))
            print(f"| {name} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
