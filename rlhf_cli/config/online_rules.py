"""Rules between the keys of ppo and grpo: which combinations of switches are sound, and why not."""

from collections.abc import Callable, Iterator

from rlhf_cli.config import catalog
from rlhf_cli.config.schema.hardware import VLLM
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import GrpoConfig, OnlineConfig, PpoConfig, Run
from rlhf_cli.config.stages import stage_name

# The limit of each alarm, and whether it reads evaluations on held-out prompts.
ALARMS = {
    "kl": "max_kl",
    "reward": "target_reward",
    "entropy": "min_entropy",
    "length": "max_length_drift",
    "repetition": "max_repetition",
    "truncated": "max_truncated",
    "sampling_gap": "max_sampling_gap",
    "overoptimised": "overoptimised",
}
_UNSOUND_IN_REWARD = {
    "k2": "its mean is not the KL",
    "k3": "its mean is the KL, but no gradient flows through a reward and half of its own is lost",
    "weighted_k3": "its weight only acts through its gradient, and none flows through a reward",
    "full": "no gradient flows through a reward, so the KL at a token's own position is lost",
}


def batches(cfg: OnlineConfig) -> Iterator[str]:
    """Minibatches fill the batch."""
    if cfg.algo.batch_size % cfg.algo.minibatch_size:
        yield (
            f"algo.minibatch_size={cfg.algo.minibatch_size} must divide "
            f"algo.batch_size={cfg.algo.batch_size}"
        )


def kl(cfg: OnlineConfig) -> Iterator[str]:
    """Every estimator stands where its gradient means something."""
    algo = cfg.algo
    estimator = algo.kl_estimator
    if algo.kl_in == "reward" and estimator in _UNSOUND_IN_REWARD:
        yield (
            f"algo.kl_estimator={estimator} does not belong in the reward: "
            f"{_UNSOUND_IN_REWARD[estimator]}; take k1 there, or algo.kl_in=loss"
        )
    if algo.kl_in == "loss" and estimator == "k1":
        yield (
            "algo.kl_estimator=k1 does not belong in the loss: its expected gradient is 0, so it "
            "holds nothing back; take full, weighted_k3 or k2, or algo.kl_in=reward"
        )
    updates = algo.epochs * (algo.batch_size // algo.minibatch_size)
    if algo.kl_in == "loss" and estimator in ("k2", "k3") and updates > 1:
        yield (
            f"algo.kl_estimator={estimator} is right on the policy's own samples, but there are "
            f"{updates} updates per batch; take weighted_k3 or full, or algo.epochs=1 and "
            f"algo.minibatch_size={algo.batch_size}"
        )
    if (
        algo.kl_coef_end is not None
        and isinstance(cfg, PpoConfig)
        and cfg.algo.kl_controller != "fixed"
    ):
        yield f"algo.kl_coef_end and algo.kl_controller={cfg.algo.kl_controller} both set kl_coef"
    unused = algo.kl_coef == 0 and not algo.kl_coef_end
    if isinstance(cfg, GrpoConfig) and cfg.algo.refresh_reference is not None and unused:
        yield "algo.refresh_reference moves what the KL is measured to, but algo.kl_coef=0"


def kl_controller(cfg: OnlineConfig) -> Iterator[str]:
    """A controller has something to steer."""
    if isinstance(cfg, PpoConfig) and cfg.algo.kl_controller != "fixed" and cfg.algo.kl_coef == 0:
        yield "a kl_controller multiplies algo.kl_coef, so it must start above 0"


def ratios(cfg: OnlineConfig) -> Iterator[str]:
    """Clips cut what they are for, and a loss without a ratio learns once."""
    algo, loss = cfg.algo, getattr(cfg.algo, "loss", None)
    highest = 1 + (algo.clip_high or algo.clip or 0.0)
    if algo.dual_clip is not None and algo.dual_clip <= highest:
        yield f"algo.dual_clip={algo.dual_clip:g} must lie above the clipped ratio, {highest:g}"
    if loss == "policy_gradient" and (algo.epochs, algo.minibatch_size) != (1, algo.batch_size):
        yield (
            "algo.loss=policy_gradient has no ratio to correct for older rollouts: it needs "
            f"algo.epochs=1 and algo.minibatch_size={algo.batch_size}, the whole batch"
        )
    if (
        isinstance(cfg, GrpoConfig)
        and loss == "sequence_clip"
        and cfg.algo.aggregate != "response_mean"
    ):
        yield (
            f"algo.loss=sequence_clip has one ratio per response: algo.aggregate=response_mean "
            f"gives each the same weight, {cfg.algo.aggregate} does not"
        )


def correction(cfg: OnlineConfig) -> Iterator[str]:
    """Samples are weighed as the loss allows, and a cap caps something."""
    algo, cap = cfg.algo, "algo.rollout_correction_cap"
    if getattr(algo, "loss", None) == "sequence_clip" and algo.rollout_correction == "token":
        yield (
            "algo.loss=sequence_clip has one ratio per response, whose tokens cannot weigh "
            "differently: take algo.rollout_correction=sequence"
        )
    off = algo.rollout_correction == AUTO and cfg.hardware.rollout != VLLM
    unused = catalog.keys(stage_name(cfg))[cap].metadata["unused"]
    if off and algo.rollout_correction_cap != unused:
        yield (
            f"{cap}={algo.rollout_correction_cap:g} is not used by algo.rollout_correction=auto "
            f"with hardware.rollout={cfg.hardware.rollout}; set it to {unused:g}, or take "
            "algo.rollout_correction=token or sequence"
        )


def groups(cfg: OnlineConfig) -> Iterator[str]:
    """Baseline, normalisation and supervision of groups fit each other."""
    if not isinstance(cfg, GrpoConfig):
        return
    algo = cfg.algo
    if algo.group_size == 1 and algo.baseline != "none":
        yield f"algo.baseline={algo.baseline} compares within a group, but algo.group_size=1"
    rounds = f"algo.dynamic_sampling={algo.dynamic_sampling}"
    if algo.group_size == 1 and algo.dynamic_sampling:
        yield f"{rounds} looks for unequal rewards, but algo.group_size=1"
    if algo.dynamic_sampling and algo.baseline == "none":
        yield f"{rounds} compares within groups, but algo.baseline=none does not"
    charged = algo.kl_in == "reward" and (algo.kl_coef > 0 or bool(algo.kl_coef_end))
    if algo.dynamic_sampling and charged:
        yield (
            f"{rounds} drops groups of equal rewards, which teach the KL where "
            "algo.kl_in=reward; take algo.kl_in=loss or algo.dynamic_sampling=0"
        )
    if algo.baseline == "none" and algo.aggregate == "response_mean":
        yield (
            "algo.baseline=none with algo.aggregate=response_mean favours a length, whatever its "
            "reward; take token_mean, response_sum or max_tokens"
        )
    if algo.normalise_advantages == "group" and algo.baseline != "group_mean":
        yield (
            "algo.normalise_advantages=group divides by the deviation from the group's mean: it "
            f"needs algo.baseline=group_mean, got {algo.baseline}"
        )
    if algo.supervision == "process":
        if algo.baseline != "group_mean" or algo.normalise_advantages == "batch":
            yield (
                "algo.supervision=process normalises over the steps of a group: it needs "
                "algo.baseline=group_mean and algo.normalise_advantages=group or none"
            )
        if charged:
            yield "algo.supervision=process has rewards of steps, not tokens: take algo.kl_in=loss"


def refreshing(cfg: OnlineConfig) -> Iterator[str]:
    """A reward model that is trained further has pairs, and nothing compares what it says."""
    if not isinstance(cfg, GrpoConfig) or cfg.algo.refresh_reward is None:
        return
    algo = cfg.algo
    if algo.group_size == 1:
        yield "algo.refresh_reward learns from pairs within a group, but algo.group_size=1"
    if algo.keep in ("reward", "rlhf_reward", "eval/reward"):
        yield (
            f"algo.keep={algo.keep} compares rewards that algo.refresh_reward changes in between; "
            "take last or eval/gold"
        )
    for name in ("target_reward", "overoptimised"):
        if getattr(algo, name) is not None:
            yield f"algo.{name} compares rewards that algo.refresh_reward changes; set it to null"


def responses(cfg: OnlineConfig) -> Iterator[str]:
    """What is said of responses that never ended does not contradict itself."""
    algo = cfg.algo
    if algo.supervision == "process" and algo.missing_eos_reward is not None:
        yield (
            "algo.missing_eos_reward replaces the score of a whole response, but "
            "algo.supervision=process; set it to null, algo.missing_eos_penalty is subtracted"
        )
    if algo.missing_eos_reward is not None and algo.missing_eos_penalty:
        yield "algo.missing_eos_reward replaces what algo.missing_eos_penalty lowers; give one"
    if algo.mask_truncated and (algo.missing_eos_reward is not None or algo.missing_eos_penalty):
        yield (
            "algo.mask_truncated=true learns nothing from responses that never ended; set "
            "algo.missing_eos_reward=null and algo.missing_eos_penalty=0"
        )
    overlong, longest = algo.overlong_tokens, algo.max_tokens
    if overlong is not None and longest is not None and overlong > longest:
        yield (
            f"algo.overlong_tokens={algo.overlong_tokens:g} exceeds "
            f"algo.max_tokens={algo.max_tokens}"
        )


def watching(cfg: OnlineConfig) -> Iterator[str]:
    """Evaluations, alarms and the weights that are kept have what they read."""
    algo = cfg.algo
    if cfg.gold is not None and algo.eval_every is None:
        yield f"gold={cfg.gold} needs algo.eval_every, the iterations between its evaluations"
    if algo.keep.startswith("eval/") and algo.eval_every is None:
        yield f"algo.keep={algo.keep} is measured in evaluations: set algo.eval_every"
    if algo.keep == "eval/gold" and cfg.gold is None:
        yield "algo.keep=eval/gold needs gold=..., a judge that is never trained on"
    if algo.keep in ("reward", "rlhf_reward") and algo.ema_decay is not None:
        yield (
            f"algo.keep={algo.keep} is measured on samples of the weights in training, but "
            "algo.ema_decay writes their average; take algo.keep=eval/reward"
        )
    moving = algo.kl_coef_end is not None or (
        isinstance(cfg, PpoConfig) and cfg.algo.kl_controller != "fixed"
    )
    if algo.keep == "rlhf_reward" and moving:
        yield "algo.keep=rlhf_reward compares iterations, but kl_coef changes between them"
    if algo.scale_rewards and (
        algo.keep in ("reward", "rlhf_reward") or algo.target_reward is not None
    ):
        yield (
            "algo.scale_rewards changes the unit of the reward as it goes: algo.keep and "
            "algo.target_reward cannot compare iterations; take algo.keep=eval/reward"
        )
    if algo.overoptimised is not None and (cfg.gold is None or algo.eval_every is None):
        yield "algo.overoptimised compares reward and gold in evaluations: give gold and eval_every"
    for alarm in algo.stop_on:
        if getattr(algo, ALARMS[alarm]) is None:
            yield f"algo.stop_on names {alarm}, but its limit algo.{ALARMS[alarm]} is null"


_ONLINE: tuple[Callable[[OnlineConfig], Iterator[str]], ...] = (
    batches,
    kl,
    kl_controller,
    ratios,
    correction,
    groups,
    refreshing,
    responses,
    watching,
)


def online_rules(cfg: Run) -> Iterator[str]:
    """Complaints about a config of a stage that learns from its own samples."""
    if isinstance(cfg, OnlineConfig):
        for rule in _ONLINE:
            yield from rule(cfg)
