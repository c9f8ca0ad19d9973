"""Policy gradients for language models: rewards, advantages and clipped losses.

Every tensor over tokens is (B, T), zero outside the response mask.
"""

import torch
from torch import Tensor


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = -kl_coef (log pi - log ref), plus the score at the last response token.

    Args:
        scores: (B,) reward of each response.
        logprobs, reference: (B, T) log-probs of the sampled tokens; no gradient flows through.
        mask: (B, T) response tokens, EOS included; each row has at least one.

    Returns:
        (B, T) per-token rewards, zero outside the mask. Source: InstructGPT 2203.02155 eq. 2.
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    last = last_index(mask)  # (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards.detach()


def last_index(mask: Tensor) -> Tensor:
    """Index of the last True in each row: (B, T) -> (B,)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(-1)


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


def clipped_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-w A, -clip(w, 1 - clip, 1 + clip) A) per token, w = exp(logprobs - old).

    Args:
        logprobs: (B, T) current log-probs, with gradient.
        old: (B, T) log-probs when the responses were sampled.
        advantages: (B, T), or (B, 1) for one advantage per response.

    Returns:
        (B, T) losses (PPO 1707.06347 eq. 7, sign turned).
    """
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> Tensor:
    """0.5 max((V - R)^2, (V_clipped - R)^2) per token; 0.5 (V - R)^2 when clip is None.

    V_clipped stays within `clip` of the value at rollout time. All (B, T).
    Source: openai/baselines ppo2, which PPO papers for language models follow.
    """
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each group (GRPO 2402.03300 sec. 4.1.2).

    std has ddof 1. A group of equal rewards is worth exactly 0, whatever the rounding of its mean.

    Args:
        rewards: (P, G), a row per prompt.

    Returns:
        (P, G) advantages.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    return torch.where(equal, 0.0, centred / (rewards.std(-1, keepdim=True) + eps))
