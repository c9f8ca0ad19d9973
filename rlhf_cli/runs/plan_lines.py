"""What a run says of itself before it starts: rewards, whose code, who samples, arithmetic."""

from typing import Any

from rlhf_cli.config.own_code import parameters_of
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import LabelConfig, Run
from rlhf_cli.config.selection_rules import REWARD, choosers
from rlhf_cli.config.stages import row_kind_name, stage_name
from rlhf_cli.config.switches import given_to
from rlhf_cli.data.kinds import JUDGEMENTS, row_kind
from rlhf_cli.rewards.specs import meaning_of, terms_of
from rlhf_cli.runs.provenance import own_loss, rewards_of
from rlhf_cli.runs.sharing import expects_gpu


def reward_lines(cfg: Run) -> list[str]:
    """What each term of the rewards stands for."""
    return [
        f"{role}: {term.weight:g} x {term.spec}: {meaning_of(term.spec)}"
        for role, reward in rewards_of(cfg)
        for term in terms_of(reward)
    ]


def own_loss_lines(cfg: Run) -> list[str]:
    """That a loss is the user's own, and so whose code runs."""
    if (own := own_loss(cfg)) is None:
        return []
    given = given_to(stage_name(cfg), "algo.loss", parameters_of("algo.loss", *own))
    return [f"algo.loss: code of {own[0]} runs: {own[1]} gives the losses, of {', '.join(given)}"]


def sampler_lines(cfg: Run) -> list[str]:
    """Who samples, where this process does not."""
    hardware = cfg.hardware
    if hardware.rollout_server is not None:
        given = ", which gets the weights of each update" if cfg.samples_online else ""
        several = isinstance(hardware.rollout_server, list)
        given = given.replace("gets", "get") if several else given
        named = ", ".join(hardware.rollout_server) if several else hardware.rollout_server
        return [f"responses: of the vLLM server{'s' * several} {named}{given}"]
    if hardware.rollout_devices is not None:
        gpus = ", ".join(map(str, hardware.rollout_devices))
        return [f"responses: of a vLLM server that is started on GPU {gpus}"]
    return []


def arithmetic_lines(cfg: Run) -> list[str]:
    """The batch arithmetic, spelled out."""
    algo: Any = cfg.algo
    if cfg.samples_online:
        return online_arithmetic_lines(algo)
    if cfg.trains:
        judged = row_kind(cfg) in JUDGEMENTS
        rows = f"{row_kind_name(cfg)} rows" if judged else "rows"
        times = "1 epoch" if algo.epochs == 1 else f"{algo.epochs} epochs"
        most = "" if algo.max_steps is None else f", {algo.max_steps} updates at most"
        return [f"{times} in batches of {algo.batch_size} {rows}{most}"]
    chosen = selection_lines(cfg)
    if (given := getattr(cfg, "samples", None)) is not None:
        return [f"responses: those of samples={given}; keys of sampling are not read", *chosen]
    prompts = "all" if algo.prompts is None else algo.prompts
    return [f"{prompts} prompts x {algo.samples} responses", *chosen]


def selection_lines(cfg: Run) -> list[str]:
    """How label chooses its tasks, where it does not draw them all."""
    if not isinstance(cfg, LabelConfig) or cfg.algo.select == "random":
        return []
    named = [str(cfg.reward or "samples") if name == REWARD else name for name in choosers(cfg)]
    tasks = "one task per prompt" if cfg.algo.tasks is None else f"{cfg.algo.tasks} tasks"
    return [
        f"{tasks}: {cfg.algo.explore:g} of them drawn at random, the others chosen by "
        f"{cfg.algo.select} of {', '.join(named)}"
    ]


def online_arithmetic_lines(algo: Any) -> list[str]:
    """How many responses are sampled, and how many updates are made of them."""
    group = getattr(algo, "group_size", 1)
    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    rollouts = algo.batch_size * group
    lines = [
        f"per iteration: {algo.batch_size} prompts x {group} response{'s' * (group > 1)} = "
        f"{rollouts} rollouts; / minibatch {algo.minibatch_size} prompts x {algo.epochs} epochs = "
        f"{updates} updates",
        f"in all: {algo.steps} iterations, {algo.steps * rollouts} rollouts, "
        f"{algo.steps * updates} updates",
    ]
    if every := getattr(algo, "refresh_reward", None):
        lines.append(
            f"every {every} iterations: the reward model learns from up to {algo.batch_size} "
            "pairs of each"
        )
    return lines


def auto_lines(cfg: Run) -> list[str]:
    """What the keys of hardware that say auto will mean, for --check."""
    hardware, gpu = cfg.hardware, expects_gpu(cfg)
    at_once = {
        "tokens_per_microbatch": hardware.tokens_at_once,
        "rollout_tokens": hardware.sampled_at_once,
        "logprob_chunk": hardware.logits_at_once,
    }
    said = {
        name: "by the GPU's free memory" if gpu else str(tokens) for name, tokens in at_once.items()
    }
    said["gradient_checkpointing"] = "once memory runs out"
    said["compile"] = "if the steps after the fourth take over 3 minutes" if gpu else "false"
    told = [f"{name} {what}" for name, what in said.items() if getattr(hardware, name) == AUTO]
    return [f"hardware, auto: {', '.join(told)}"] if told else []
