"""Who takes part where a policy learns from its own samples."""

from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.schema.stages import OnlineConfig
from rlhf_cli.models.reference import Reference
from rlhf_cli.online.correction import Correction
from rlhf_cli.reporting.console import say
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.session import Session
from rlhf_cli.training.own_loss import OwnLoss, own_loss_of


@dataclass(frozen=True)
class Needs:
    """Log-probs that must be known before rollouts are learnt from.

    old: of the policy, as training computes them.
    reference: of the reference.
    """

    old: bool
    reference: bool

    @classmethod
    def of(cls, cfg: OnlineConfig, own: OwnLoss | None) -> "Needs":
        """What the iterations of a run need.

        A single update of a batch has old log-probs itself, unless the KL is charged before it in
        the reward, or measured after it. With kl_coef=0 nothing but a limit on the KL, or a loss of
        the user's, reads the reference.
        """
        algo = cfg.algo
        tied = algo.kl_coef > 0 or bool(algo.kl_coef_end)
        single = algo.epochs == 1 and algo.minibatch_size == algo.batch_size
        penalised = getattr(algo, "loss", None) == "klpen"
        named = own is not None and "reference_logprobs" in own.names
        return cls(
            old=not single or penalised or (tied and algo.kl_in == "reward"),
            reference=tied or algo.max_kl is not None or named,
        )


@dataclass
class Roles:
    """The models and judges of ppo and grpo.

    gold: a judge that is never learnt from, if there is one.
    loss: of the policy, where algo.loss names one of the user's.
    needs: of the iterations; evaluations measure all.
    correction: of samples that another engine drew.
    """

    policy: Policy
    reference: Reference
    reward: Reward
    gold: Reward | None
    loss: OwnLoss | None
    needs: Needs
    correction: Correction


def load_roles(session: Session) -> Roles:
    """The roles that a config of ppo or grpo names; the reference is the policy as it starts."""
    cfg: Any = session.cfg
    loss = own_loss_of(cfg)  # first of all: it may not load
    policy = policy_of(session, cfg.policy)
    reference = Reference(policy.model)
    reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device, policy.model)
    gold = None
    if cfg.gold is not None:
        gold = load_reward(cfg.gold, cfg, policy.tokenizer, session.device)
    needs = Needs.of(cfg, loss)
    if not needs.reference:
        say("algo.kl_coef=0: no KL to the reference is computed; a limit, algo.max_kl, asks for it")
    correction = Correction.of(cfg.algo, policy.engine)
    if correction.level is not None:
        say(correction.said())
    return Roles(policy, reference, reward, gold, loss, needs, correction)
