"""Keys of the group hardware: where a stage runs, and in what portions."""

from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.schema.keys import AUTO, key

VLLM = "vllm"
OF_A_CPU = 4096, 16384, 1024
"""What auto means there: tokens in a micro-batch, tokens sampled at once, positions of logits."""


@dataclass
class Hardware:
    """Speed and memory only: no key here changes the mathematics (but which units drop out)."""

    device: str = key(
        "Where tensors live; auto takes cuda if there is one.", choices=(AUTO, "cpu", "cuda")
    )
    threads: int | None = key(
        "CPU threads of torch; null leaves torch's own choice, and is one for models as small as "
        "the demo's.",
        ge=1,
    )
    processes: Any = key(
        "Processes that this command starts to share the work, each with a GPU of its own or with "
        "its share of the CPU's cores; auto: one for each GPU. Those of torchrun and srun are "
        "started already.",
        ge=1,
        auto=int,
    )
    max_restarts: int = key(
        "How often processes that died are started again from the newest resume point.",
        ge=0,
    )
    rank_timeout: int = key(
        "Seconds that processes wait for each other before the run ends, and names the one that "
        "did not come. What rank 0 does for all (rows, rewards, servers, files) may take longer.",
        ge=1,
    )
    tokens_per_microbatch: Any = key(
        "Tokens in one forward and backward pass, pads included; halve it when memory runs out. "
        "auto: as many as the memory of the GPU takes, up to 32768; 4096 on a CPU.",
        ge=1,
        auto=int,
    )
    rollout_tokens: Any = key(
        "Tokens whose keys, values or states are kept at once while sampling. auto: as many as a "
        "quarter of the GPU's free memory takes, up to those of a batch; 16384 on a CPU.",
        ge=1,
        auto=int,
    )
    rollout: str = key(
        "Who samples for ppo, grpo, generate, label and evaluate: this process, or a vLLM server.",
        choices=("native", VLLM),
    )
    rollout_server: Any = key(
        "Address of a running server, as http://host:8000, or of several, as "
        "[http://a:8000,http://b:8000], to which prompts are dealt.",
        texts=True,
        used_by="hardware.rollout=vllm",
    )
    rollout_devices: list[int] | None = key(
        "GPUs of this machine on which the stage starts a server of its own.",
        used_by="hardware.rollout=vllm",
    )
    rollout_sync: str = key(
        "How a server gets the weights of each update: by files in `out`, which its machine sees; "
        "nccl, from GPU to GPU; or of a policy with an adapter that alone.",
        choices=("files", "nccl", "adapter"),
        used_by="hardware.rollout=vllm",
        unused="files",
    )
    rollout_timeout: float = key(
        "Seconds within which a server starts, loads weights or answers a request.",
        gt=0,
        used_by="hardware.rollout=vllm",
        unused=600.0,
    )
    packing: str = key(
        "auto: sequences stand end to end, without pads, where a short try finds the same result; "
        "false: each has a padded row.",
        choices=("auto", "false"),
    )
    share_prompts: bool = key(
        "In packed rows compute a prompt once for all of its responses, where the model allows it."
    )
    logprob_chunk: Any = key(
        "Positions whose logits exist at once; memory is this times the vocabulary. auto: on a GPU "
        "as many as a tenth of its free memory takes, 1024 to 8192; 1024 on a CPU.",
        ge=1,
        auto=int,
    )
    gradient_checkpointing: Any = key(
        "Recompute activations in backward: less memory, slower. auto: in as many blocks as it "
        "takes, once memory runs out.",
        auto=bool,
    )
    compile: Any = key(
        "Compile the decoder's blocks for training passes: one slow step, then faster ones. "
        "auto: on a GPU, where the steps that are left take longer than 3 minutes.",
        auto=bool,
    )
    shard: str = key(
        "Of several processes, what each holds of weights, gradients and moments: none: all; full: "
        "its part of all processes' one copy; hybrid: its part of that of its machine.",
        choices=("none", "full", "hybrid"),
    )
    device_memory: float | None = key(
        "GiB of each device that --check and the start of a run compare its peak with; null: those "
        "of the device at hand.",
        gt=0,
    )
    save_every: str | None = key(
        "Between resume points: optimizer steps (ppo, grpo: iterations), as 25, or minutes, as "
        "10min; null saves when the run is interrupted only."
    )
    keep_checkpoints: int | None = key("Resume points that are kept, the newest ones.", ge=1)

    def measured(self, tokens: int, sampled: int, chunk: int) -> None:
        """What auto means from now on, as runs/budgets.py found it on a GPU."""
        vars(self)["of_the_gpu"] = tokens, sampled, chunk

    @property
    def tokens_at_once(self) -> int:
        """tokens_per_microbatch, or what auto means."""
        given = self.tokens_per_microbatch
        return self._auto[0] if given == AUTO else int(given)

    @property
    def sampled_at_once(self) -> int:
        """rollout_tokens, or what auto means."""
        given = self.rollout_tokens
        return self._auto[1] if given == AUTO else int(given)

    @property
    def logits_at_once(self) -> int:
        """logprob_chunk, or what auto means."""
        given = self.logprob_chunk
        return self._auto[2] if given == AUTO else int(given)

    @property
    def _auto(self) -> tuple[int, int, int]:
        found: tuple[int, int, int] = vars(self).get("of_the_gpu", OF_A_CPU)
        return found
