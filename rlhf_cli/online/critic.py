"""The critic of PPO: a network of its own or a head on the policy's trunk."""

from collections.abc import Sequence

from torch import Tensor, nn

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.stages import PpoConfig
from rlhf_cli.data.batches import Batch
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.order import derived_seed
from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.forward import state_values
from rlhf_cli.models.heads import value_head
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.score import scores_of, trunk_values_of, values_of
from rlhf_cli.models.scorers import load_critic
from rlhf_cli.rewards.models import CheckpointReward
from rlhf_cli.rewards.reward import Reward
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session


class Critic:
    """Values of the states in which tokens are drawn, in the units of the reward.

    A separate critic starts as the reward model of whole responses that the reward holds, and is
    normalised and weighted as that is, so that it already knows the scale of what it predicts.
    Under any other reward or scale, and as a head on the policy's trunk, its values start at 0.

    model: what the optimizer trains: the network, or the head alone.
    head: the head on the policy's trunk; None for a network of its own.
    """

    def __init__(self, cfg: PpoConfig, reward: Reward, policy: Policy, session: Session) -> None:
        self._policy = policy
        self.head: nn.Linear | None = None
        self.mean, self.std = 0.0, 1.0
        self.model: nn.Module
        if cfg.algo.critic == "shared":
            self.model = self.head = value_head(policy.model)
            return
        term = None if cfg.algo.scale_rewards else reward.critic_start
        start = None if term is None else term.source
        assert start is None or isinstance(start, CheckpointReward)
        self.model = load_critic(
            None if start is None else start.path,
            cfg.policy,
            cfg.model,
            policy.tokenizer,
            derived_seed(cfg.seed, "head"),
            session.device,
            policy.model,
        )
        if term is not None and start is not None:
            self.mean, self.std = start.mean, start.std / term.weight
            check_critic(session, start, self.model, policy)
        if cfg.hardware.gradient_checkpointing is True:
            recompute_activations(self.model)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw outputs of the head in the units of the reward."""
        return (raw - self.mean) / self.std

    def values_of(self, sequences: Sequence[Tokens], hardware: Hardware) -> list[Tensor]:
        """Per sequence (len(response),) the value of the state in which each token was drawn."""
        if self.head is not None:
            raw = trunk_values_of(self._policy.model, self.head, sequences, hardware)
        else:
            raw = values_of(self.model, sequences, hardware)
        return [self.normalise(values) for values in raw]

    def values(self, batch: Batch, of_trunk: Tensor | None) -> Tensor:
        """(B, T) values with gradient.

        Args:
            of_trunk: what a head on the policy's trunk gave in the policy's own pass.
        """
        if self.head is None:
            return self.normalise(state_values(self.model, batch))
        assert of_trunk is not None
        return self.normalise(of_trunk)


def check_critic(
    session: Session, reward: CheckpointReward, critic: nn.Module, policy: Policy
) -> None:
    """The critic starts as the reward model: equal raw scores at the last token."""
    ids = policy.tokenizer("a").input_ids
    probe = [Tokens(ids, [policy.stop_ids[0]])]
    raw = [scores_of(model, probe, session.cfg.hardware) for model in (reward.model, critic)]
    gap = (raw[0] - raw[1]).abs().max().item()
    session.require(
        "critic_minus_reward_at_start",
        gap,
        gap < (1e-3 if matmul_in_float32(critic) else 0.1),
        f"the critic's value at the last token is not the score of {reward.path}; its head or "
        "adapter was not loaded",
    )
