"""Learning from comparisons: reward models and direct preference optimisation."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) for each pair (InstructGPT 2203.02155 eq. 1 with K = 2).

    Args:
        chosen, rejected: (N,) scores r_w and r_l.

    Returns:
        (N,) losses; ln 2 at equal scores.
    """
    return -logsigmoid(chosen - rejected)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid DPO loss (2305.18290 eq. 7), smoothed as in cDPO when label_smoothing e > 0.

    With h = (log pi_w - log ref_w) - (log pi_l - log ref_l):
    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), stationary at
    sigmoid(beta h) = 1 - e.

    Args:
        policy_*, reference_*: (N,) sequence log-probs, summed over response tokens with EOS.
        beta: tie to the reference; larger stays closer.
        label_smoothing: assumed share e of flipped labels, 0 <= e < 0.5.

    Returns:
        (N,) losses, and (N,) implicit rewards beta (log pi - log ref) of the chosen and of the
        rejected side, without gradient.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected  # beta h
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach()
