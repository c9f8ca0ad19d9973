"""Policy gradients for language models: losses of single tokens, and how they are averaged.

Losses are elementwise on (B, T) or (N,) tokens; advantages broadcast, so that (B, 1) gives a whole
response one. log_ratio is log w = log pi - log pi_old, and sg() stops the gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_cli.objectives.kl import k3

LARGEST_LOG_RATIO = 20.0  # beyond it exp may overflow, and infinity times 0 is no gradient


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi, whose gradient on samples of pi is that of -E[A] (REINFORCE, Williams 1992).

    The value means nothing; the gradient does. Args: logprobs with gradient.
    """
    return -advantages * logprobs


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """max(-w A, -clip(w, 1 - clip, 1 + clip_high) A) per token.

    Args:
        log_ratio: log w, with gradient: logprobs - old, or `sequence_log_ratio`.
        advantages: A.
        clip_high: room above 1 (DAPO 2503.14476 eq. 10); None is `clip` as in PPO.
        dual_clip: c > 1 bounds the loss by -c A where A < 0 (1912.09729 eq. 5), so that one token
            which became likely cannot rule the step; None bounds nothing.

    Returns:
        losses (PPO 1707.06347 eq. 7, sign turned).
    """
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clipped(log_ratio: Tensor, clip: float | None, clip_high: float | None) -> Tensor:
    """1 where the ratio lies outside 1 - clip .. 1 + clip_high, else 0; for reporting."""
    ratio = log_ratio.detach().exp()
    high = clip if clip_high is None else clip_high
    outside = torch.zeros_like(ratio)
    if clip is not None:
        outside = outside + (ratio < 1 - clip)
    if high is not None:
        outside = outside + (ratio > 1 + high)
    return outside


def sequence_log_ratio(logprobs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """log s of the response at each of its tokens, s = (pi(y|x) / pi_old(y|x))^(1 / len).

    In GSPO's token form (2507.18071 eq. 13, 14): sg(log s) + l_t - sg(l_t), so that exp of it is
    worth s and its gradient is s grad l_t. The mean over the tokens of a response has the gradient
    of s itself.

    Args:
        logprobs: (B, T) l, with gradient.
        old: (B, T) log-probs when the responses were sampled.
        mask: (B, T) response tokens.

    Returns:
        (B, T), zero outside the mask.
    """
    log_ratio = torch.where(mask, logprobs - old, 0.0).detach()
    mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return torch.where(mask, mean + logprobs - logprobs.detach(), 0.0)


def cispo_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float | None, clip_high: float
) -> Tensor:
    """-sg(clip(w, 1 - clip, 1 + clip_high)) A log pi: the weight is clipped, not the gradient.

    Every token keeps a gradient, of a bounded weight (CISPO, MiniMax-M1 2506.13585 eq. 4, 5).

    Args:
        logprobs: with gradient.
        old: log-probs when the responses were sampled.
        clip: room below 1; None leaves small weights alone, as the paper does.
    """
    low = 0.0 if clip is None else 1 - clip
    weight = torch.exp(logprobs - old).clamp(low, 1 + clip_high).detach()
    return -weight * advantages * logprobs


def penalised_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, old_kl_coef: float
) -> Tensor:
    """-w A + old_kl_coef (w - 1 - log w): PPO with a penalty in place of the clip.

    E_old[w - 1 - log w] = KL(old || pi) (1707.06347 eq. 8), value and gradient, and no sample of
    it is negative. The tie is to the policy that sampled, not to the reference.
    """
    return -torch.exp(logprobs - old) * advantages + old_kl_coef * k3(old, logprobs)


def rollout_weights(log_ratio: Tensor, lengths: Sequence[int], level: str, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap): what a sample weighs in a loss that is a mean over pi_old.

    The sampler is pi_old but for its arithmetic, and what it draws is a little off. Without a cap a
    whole response's ratio makes every mean the right one: E_sampler[weight f] = E_old[f]. With it
    that is sum_y min(pi_old, cap pi_sampler) f, less than it should be and of a bounded spread
    (truncated importance sampling, Ionides 2008). A token's own ratio is right for what the token
    itself is worth, in contexts that the sampler came to; its spread does not grow with the length.

    Args:
        log_ratio: (N,) log pi_old - log pi_sampler of all tokens, response after response.
        lengths: tokens of each response.
        level: token (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
            RL Training"), or sequence, the ratio of the response at each of its tokens (Liu et al.
            2025, "When Speed Kills Stability").

    Returns:
        (N,), without gradient.
    """
    logs = log_ratio.detach()
    if level == "sequence":
        parts = logs.split(list(lengths))
        logs = torch.cat([part.sum().expand(len(part)) for part in parts])
    return logs.clamp(max=LARGEST_LOG_RATIO).exp().clamp(max=cap)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> Tensor:
    """0.5 max((V - R)^2, (V_clipped - R)^2) per token; 0.5 (V - R)^2 when clip is None.

    V_clipped stays within `clip` of the value at rollout time.
    Source: openai/baselines ppo2, which PPO papers for language models follow.
    """
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


def token_weights(mask: Tensor, how: str, longest: int) -> Tensor:
    """What a token weighs in the sum of losses, zero outside the mask.

    | how           | weight      | the caller divides by | as in                    |
    |---------------|-------------|-----------------------|--------------------------|
    | response_mean | 1 / len     | responses             | GRPO 2402.03300 eq. 3    |
    | response_sum  | 1           | responses             | REINFORCE, RLOO          |
    | max_tokens    | 1 / longest | responses             | Dr. GRPO 2503.20783      |
    | token_mean    | 1           | tokens                | PPO, DAPO 2503.14476     |

    Args:
        mask: (B, T) response tokens.
        longest: tokens that a response may have.

    Returns:
        (B, T) in the dtype of the mask, or the default one if that is bool.
    """
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    share: dict[str, Tensor | float] = {
        "response_mean": 1 / lengths,
        "response_sum": 1.0,
        "max_tokens": 1 / longest,
        "token_mean": 1.0,
    }
    return mask * share[how]
