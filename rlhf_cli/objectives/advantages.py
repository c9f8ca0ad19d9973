"""Rewards of tokens, and what each token was worth: returns, critics and groups.

Every tensor over tokens is (B, T), zero outside the response mask; groups are (P, G), a row per
prompt. Nothing here carries a gradient into a policy.
"""

import torch
from torch import Tensor

from rlhf_cli.objectives.rounding import differ

# --------------------------------------------------------------------------- rewards


def last_index(mask: Tensor) -> Tensor:
    """Index of the last True in each row: (B, T) -> (B,)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(-1)


def at_last(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of each response at its last token, zero elsewhere.

    Args:
        scores: (B,).
        mask: (B, T) response tokens, EOS included; an empty row has no place for its score.

    Returns:
        (B, T) rewards.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions == last_index(mask)[:, None]) & mask  # (B, T)
    return torch.where(last, scores[:, None], 0.0)


def kl_shaped_rewards(
    rewards: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t - kl_coef (log pi - log ref): the tie to the reference as a part of the reward.

    Args:
        rewards: (B, T) without the tie, such as `at_last` of the scores.
        logprobs, reference: (B, T) log-probs of the sampled tokens; no gradient flows through.
        mask: (B, T) response tokens, EOS included.

    Returns:
        (B, T) per-token rewards, zero outside the mask. Source: InstructGPT 2203.02155 eq. 2.
    """
    return torch.where(mask, rewards - kl_coef * (logprobs - reference), 0.0).detach()


def soft_overlong(lengths: Tensor, longest: int, soft: int) -> Tensor:
    """Penalty of long responses: 0 up to longest - soft tokens, then linear to -1 at longest.

    Source: DAPO 2503.14476 eq. 13; it is added to the reward.

    Args:
        lengths: (B,) tokens.
        longest: tokens at which the penalty is whole.
        soft: tokens over which it grows, at least 1.

    Returns:
        (B,) rewards in [-1, 0].
    """
    return ((longest - soft - lengths) / soft).clamp(-1, 0)


# --------------------------------------------------------------------------- returns


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438 eq. 16) over contiguous response tokens.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token;
    A_t = delta_t + gamma lam A_{t+1}.

    Args:
        rewards, values, mask: (B, T).

    Returns:
        advantages and returns A + V (from unwhitened advantages), both (B, T), zero outside.
    """
    values = values * mask
    rewards = rewards * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_{t+1}, (B,)
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1}, the discounted rewards from each token on. All (B, T)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


# --------------------------------------------------------------------------- groups
# NaN marks a response without a reward. It is left out of its group and worth 0.


def group_centred(rewards: Tensor) -> Tensor:
    """r - mean of the group (Dr. GRPO 2503.20783).

    Exactly 0 where a group's rewards are EQUAL, and where a group has fewer than two. Its expected
    gradient is (G - 1) / G times that of `leave_one_out`.

    Args:
        rewards: (P, G), a row per prompt; NaN where there is none.

    Returns:
        (P, G) advantages.
    """
    if not rewards.numel():
        return rewards
    centred = rewards - rewards.nanmean(-1, keepdim=True)
    return torch.where(~rewards.isnan() & differ(rewards)[..., None], centred, 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """r_i - mean of the others, G / (G - 1) (r_i - mean): RLOO (2402.14740).

    The baseline does not depend on the response, so the gradient is unbiased. Shapes, NaN and
    equal groups as in `group_centred`.
    """
    count = (~rewards.isnan()).sum(-1, keepdim=True)  # (P, 1)
    return group_centred(rewards) * count / (count - 1).clamp(min=1)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each group (GRPO 2402.03300 sec. 4.1.2).

    std has ddof 1. Shapes, NaN and equal groups as in `group_centred`.
    """
    centred = group_centred(rewards)
    count = (~rewards.isnan()).sum(-1, keepdim=True)
    variance = (centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(centred == 0, 0.0, centred / (variance.sqrt() + eps))


def process_advantages(
    rewards: list[Tensor],
    ends: list[list[int]],
    lengths: list[int],
    normalise: bool,
    eps: float = 1e-4,
) -> list[Tensor]:
    """A_{i,t} = sum of the rewards of the steps of response i that end at or after token t.

    The rewards of all steps of all responses of the group are centred first, and divided by their
    std (ddof 1) plus eps if `normalise` (GRPO 2402.03300 sec. 4.1.3). Tokens after the last step
    are worth 0, as is a response without steps, a step whose reward is NaN, and a group whose
    steps all have the same reward.

    Args:
        rewards: of one group, a tensor (n_i,) for each response, a value for each step.
        ends: the index in the response of each step's last token.
        lengths: tokens of each response.

    Returns:
        (len_i,) advantages for each response.
    """
    steps = torch.cat(rewards)[None]  # (1, steps of the group)
    worth = (group_advantages(steps, eps) if normalise else group_centred(steps))[0]
    advantages = []
    counts = [len(own) for own in rewards]
    for own, places, length in zip(worth.split(counts), ends, lengths, strict=True):
        at_ends = own.new_zeros(length).index_add(
            0, torch.tensor(places).to(own.device).long(), own
        )
        advantages.append(at_ends.flip(0).cumsum(0).flip(0))
    return advantages
