"""Every switch of ppo and grpo that does not fit the others is refused, and told why."""

import pytest

from rlhf_cli.config import catalog
from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.online_rules import ALARMS

ONCE = "algo.epochs=1 algo.minibatch_size=64"
REFUSED = [
    ("ppo algo.kl_estimator=k2", "k2 does not belong in the reward: its mean is not the KL"),
    ("ppo algo.kl_estimator=k3", "k3 does not belong in the reward"),
    ("ppo algo.kl_estimator=weighted_k3", "weighted_k3 does not belong in the reward"),
    ("ppo algo.kl_estimator=full", "full does not belong in the reward"),
    ("ppo algo.kl_in=loss", "k1 does not belong in the loss: its expected gradient is 0"),
    ("ppo algo.kl_in=loss algo.kl_estimator=k2", "there are 4 updates per batch"),
    ("ppo algo.kl_in=loss algo.kl_estimator=k3", "there are 4 updates per batch"),
    ("ppo algo=ppo_adaptive algo.kl_coef_end=0.1", "both set kl_coef"),
    ("grpo algo.refresh_reference=2 algo.kl_coef=0", "but algo.kl_coef=0"),
    ("ppo algo.clip=null", "algo.loss=clip needs algo.clip"),
    ("grpo algo=gspo algo.clip=null", "algo.loss=sequence_clip needs algo.clip"),
    ("grpo algo=cispo algo.clip_high=null", "algo.loss=cispo needs algo.clip_high"),
    ("ppo algo=ppo_klpen algo.clip=0.2", "algo.clip is not used by algo.loss=klpen"),
    ("grpo algo=rloo algo.clip_high=0.2", "algo.clip_high is not used by algo.loss=policy_gradi"),
    ("grpo algo=gspo algo.dual_clip=3", "algo.dual_clip is not used by algo.loss=sequence_clip"),
    ("ppo algo.dual_clip=1", "algo.dual_clip must be a number > 1"),
    ("ppo algo.dual_clip=1.1", "must lie above the clipped ratio, 1.2"),
    (
        "grpo algo=reinforce_pp algo.group_size=4 algo.dynamic_sampling=1",
        "algo.baseline=none does not",
    ),
    ("grpo algo=rloo algo.dynamic_sampling=1", "which teach the KL"),
    ("ppo algo.scale_rewards=true algo.keep=reward", "changes the unit of the reward"),
    ("ppo algo=ppo_adaptive algo.keep=rlhf_reward", "kl_coef changes between them"),
    ("ppo algo=a2c algo.epochs=2", "algo.epochs=1 and algo.minibatch_size=64, the whole batch"),
    ("ppo algo=reinforce algo.minibatch_size=32", "no ratio to correct for older rollouts"),
    (
        "ppo algo.old_kl_coef=1",
        "algo.old_kl_coef is not used by algo.loss=clip; set it to null, or take algo=ppo_klpen",
    ),
    ("ppo algo=ppo_klpen algo.old_kl_coef=null", "algo.loss=klpen needs algo.old_kl_coef"),
    ("grpo algo=gspo algo.aggregate=token_mean", "one ratio per response"),
    ("ppo algo.critic=null", "algo.baseline=critic needs algo.critic"),
    ("ppo algo.lam=null", "algo.baseline=critic needs algo.lam"),
    (
        "ppo algo=reinforce algo.lam=0.9",
        "algo.lam is not used by algo.baseline=mean; set it to null, as algo=reinforce does",
    ),
    ("ppo algo=reinforce algo.value_clip=0.2", "algo.value_clip is not used by algo.baseline=mean"),
    ("grpo algo.group_size=1", "algo.baseline=group_mean compares within a group"),
    (
        "grpo algo=reinforce_pp algo.dynamic_sampling=1",
        "looks for unequal rewards, but algo.group_size=1",
    ),
    ("grpo algo=rloo algo.normalise_advantages=group", "needs algo.baseline=group_mean"),
    ("grpo algo=reinforce_pp algo.aggregate=response_mean", "favours a length"),
    ("grpo algo=grpo_process algo.normalise_advantages=batch", "over the steps of a group"),
    ("grpo algo=grpo_process algo.kl_in=reward algo.kl_estimator=k1", "take algo.kl_in=loss"),
    ("ppo algo.supervision=process", "algo.missing_eos_reward replaces the score of a whole"),
    ("ppo algo.missing_eos_penalty=1", "give one"),
    ("ppo algo.mask_truncated=true", "learns nothing from responses that never ended"),
    ("ppo algo.overlong_tokens=64", "algo.overlong_tokens=64 exceeds algo.max_tokens=32"),
    ("ppo gold=demo_gold", "gold=demo_gold needs algo.eval_every"),
    ("ppo algo.keep=eval/reward", "is measured in evaluations: set algo.eval_every"),
    ("ppo algo.keep=eval/gold algo.eval_every=5", "algo.keep=eval/gold needs gold="),
    ("ppo algo.keep=reward algo.ema_decay=0.9", "take algo.keep=eval/reward"),
    ("ppo algo.overoptimised=2", "give gold and eval_every"),
    ("ppo algo.keep=best", "algo.keep must be last|reward"),
]


@pytest.mark.parametrize(("words", "part"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_is_unsound_is_refused_in_a_line(words: str, part: str) -> None:
    stage, *overrides = words.split()
    with pytest.raises(UserError) as caught:
        compose(stage, overrides)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("alarm", ALARMS)
def test_an_alarm_that_stops_needs_its_limit(alarm: str) -> None:
    with pytest.raises(UserError, match=f"its limit algo.{ALARMS[alarm]} is null"):
        compose("ppo", [f"algo.stop_on=[{alarm}]", f"algo.{ALARMS[alarm]}=null"])


@pytest.mark.parametrize(
    "words",
    [
        f"ppo algo.kl_in=loss algo.kl_estimator=k2 {ONCE}",
        "ppo algo.kl_in=loss algo.kl_estimator=weighted_k3",
        "ppo algo.kl_in=loss algo.kl_estimator=full algo.critic=shared algo.dual_clip=3",
        "ppo algo=reinforce algo.baseline=none",
        "ppo algo=ppo_klpen algo.old_kl_target=null",
        "ppo algo.supervision=process algo.missing_eos_reward=null",
        "grpo algo.kl_in=reward algo.kl_estimator=k1 algo.normalise_advantages=batch",
        "grpo algo=rloo algo.loss=clip algo.clip=0.2 algo.epochs=2",
        "grpo algo=grpo_process algo.normalise_advantages=none algo.dynamic_sampling=2",
        "grpo algo=reinforce_pp algo.group_size=4 algo.baseline=group_mean",
    ],
)
def test_what_is_sound_is_allowed(words: str) -> None:
    stage, *overrides = words.split()
    compose(stage, overrides)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_every_option_of_a_stage_composes_as_it_is(stage: str) -> None:
    dirs = catalog.config_dirs()
    own = [
        name
        for name in catalog.options("algo", dirs)
        if stage in catalog.stages_of("algo", name, dirs)
    ]
    assert len(own) >= 8
    for name in own:
        needed = ["judge=demo_gold", "reward=r"] if name == "grpo_iterative" else []
        compose(stage, [f"algo={name}", *needed])
