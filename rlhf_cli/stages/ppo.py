"""PPO and PPO-ptx: reinforcement learning from a reward, as InstructGPT did it.

    maximise E[r(x, y) - kl_coef sum_t log(pi/ref)] + ptx_coef E_text[log pi]  (2203.02155 eq. 2)

Rollouts from the current policy are scored; each token is rewarded -kl_coef log(pi/ref), and the
last one the score as well. A critic that starts as the reward model gives advantages (GAE). Policy
and critic take clipped steps (1707.06347 eq. 7) over a few epochs of minibatches; with ptx_coef > 0
the gradient of plain text, a mean per token, joins each of these steps.

    rlhf-cli ppo algo=ppo_ptx policy=runs/demo/sft reward=runs/demo/reward
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema import Ppo, PpoAlgo
from rlhf_cli.data.batches import collate, cut, derived_seed, draw, order_of
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.rows import read_split, read_texts
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import (
    matmul_in_float32,
    response_nll,
    state_values,
    token_logprobs,
    unwrap,
)
from rlhf_cli.models.heads import scalar_head
from rlhf_cli.models.load import load_scorer, scorer_from_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of, mean_nll, scores_of, values_of
from rlhf_cli.models.shared import recompute_activations
from rlhf_cli.objectives.advantages import at_last, gae, kl_shaped_rewards
from rlhf_cli.objectives.kl import k1, schulman_kl_coef, ziegler_kl_coef
from rlhf_cli.objectives.likelihood import masked_whiten
from rlhf_cli.objectives.policy_gradient import clipped_policy_loss, clipped_value_loss
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.samples import known_or_none, show_samples
from rlhf_cli.rewards.models import CheckpointReward
from rlhf_cli.rewards.sources import Reward, load_reward, scores_with_eos_rule
from rlhf_cli.rollout.rollouts import Rollout, sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.training.optimize import Loss, Metrics, Optimizer, Part, mean_metrics
from rlhf_cli.training.roles import Policy, check_first_ratio, check_reference, load_role
from rlhf_cli.training.session import Session, begin


@dataclass
class Experience:
    """A rollout as the update sees it; every tensor is (len(response),)."""

    tokens: Tokens
    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def run(cfg: Ppo) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    policy = load_role(session, cfg.policy)
    reference = Reference(policy.model)
    reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
    critic = Critic(cfg, reward, policy, session)

    rows = read_split(cfg.data, Prompt)
    prompts = list(zip(*policy.encoder.prompts(rows.train), strict=True))
    reward.check(rows.train, session.require)
    plain = read_texts(cfg.data)
    texts, unseen = policy.encoder.texts(plain.train), policy.encoder.texts(plain.held_out)
    session.note(policy.encoder, rows.notes + plain.notes)

    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    networks = {"policy": policy.model, "critic": critic.model}
    rates = {"policy": (policy.model, algo.lr), "critic": (critic.model, algo.value_lr)}
    optimizer = Optimizer(rates, algo, algo.steps * updates)
    state, _ = session.resume(networks, optimizer)
    kl_coef, metrics = state.get("kl_coef", algo.kl_coef), state.get("metrics", {})
    log, samples = session.log(), session.log("samples.jsonl")

    def rl_loss(items: list[Experience]) -> Loss:
        batch = collate([item.tokens for item in items], session.device)
        scored = token_logprobs(
            policy.model,
            batch,
            chunk=hardware.logprob_chunk,
            temperature=algo.temperature,
            with_entropy=True,
        )
        assert scored.entropy is not None
        new, entropy = scored.logprobs[batch.response], scored.entropy[batch.response]  # (N,)
        values = critic.normalise(state_values(critic.model, batch)[batch.response])
        old, old_values, advantages, returns = (
            torch.cat([getattr(item, name) for item in items]).to(new)
            for name in ("old", "values", "advantages", "returns")
        )
        policy_loss = clipped_policy_loss(new - old, advantages, algo.clip)
        value_loss = clipped_value_loss(values, old_values, returns, algo.value_clip)
        total = policy_loss + algo.vf_coef * value_loss - algo.entropy_coef * entropy
        ratio = torch.exp(new - old).detach()
        metrics = {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "entropy": entropy,
            "clip_fraction": ((ratio - 1).abs() > algo.clip).float(),
            "approx_kl": 0.5 * (new - old) ** 2,
        }
        return total.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def ptx_loss(sequences: list[Tokens]) -> Loss:
        nll = response_nll(policy.model, sequences, chunk=hardware.logprob_chunk)
        return nll, {"loss/ptx": nll.detach()}

    def parts(minibatch: list[Experience], update: int) -> list[Part]:
        """The terms of one optimizer step."""
        budget = hardware.tokens_per_microbatch
        terms = [Part(cut(minibatch, budget), rl_loss, response_tokens(minibatch))]
        if algo.ptx_coef:
            mix = draw(texts, algo.ptx_batch_size, cfg.seed, "ptx", update)
            count = sum(len(sequence.response) for sequence in mix)
            terms.append(Part(cut(mix, budget), ptx_loss, count, algo.ptx_coef))
        return terms

    with Bar("ppo", algo.steps) as bar:
        bar.advance(session.start)
        for step in range(session.start + 1, algo.steps + 1):
            rollouts = sample_rollouts(
                policy.model,
                policy.encoder,
                draw(prompts, algo.batch_size, cfg.seed, "prompts", step - 1),
                Sampling(algo.max_tokens, algo.temperature),
                samples=1,
                seed=derived_seed(cfg.seed, "rollout", step),
                stop_ids=policy.stop_ids,
                hardware=hardware,
            )
            scores = scores_with_eos_rule(rollouts, reward, algo.missing_eos_reward)
            experience, metrics, kls = collect(
                rollouts, scores, policy, reference, critic, kl_coef, cfg
            )
            if step == 1:
                check_first_ratio(session, policy.model, rollouts, algo.temperature, metrics["kl"])
            updated = []
            for epoch in range(algo.epochs):
                order = order_of(len(experience), cfg.seed, f"minibatches {step}", epoch)
                for i, start in enumerate(range(0, len(order), algo.minibatch_size)):
                    minibatch = [experience[j] for j in order[start : start + algo.minibatch_size]]
                    update = (step - 1) * updates + epoch * (updates // algo.epochs) + i
                    updated.append(optimizer.step(parts(minibatch, update)))
            metrics |= mean_metrics(updated) | {"kl_coef": kl_coef}
            kl_coef = next_kl_coef(kl_coef, metrics["kl"], algo)
            log.write(step, metrics)
            if step % algo.show_every == 0 or step in (1, algo.steps):
                show_samples(step, rollouts, known_or_none(scores), kls, samples)
            bar.advance(1, f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.2f}")
            session.save(step, networks, optimizer, {"kl_coef": kl_coef, "metrics": metrics})

    check_reference(session, reference)
    final = {name: metrics[name] for name in ("reward", "kl", "entropy", "length", "kl_coef")}
    if unseen:
        final["text/loss"] = mean_nll(policy.model, unseen, hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final)


class Critic:
    """The value network: the weights of a reward model of whole responses, or the policy's trunk.

    Values are normalised as the reward is, so that a critic that starts as the reward model
    already knows the scale of what it predicts; under any other reward they start at 0.
    """

    def __init__(self, cfg: Ppo, reward: Reward, policy: Policy, session: Session) -> None:
        tokenizer, device = policy.tokenizer, session.device
        start = reward.critic_start
        if start is None:
            self.mean, self.std = 0.0, 1.0
            seed = derived_seed(cfg.seed, "head")
            self.model = scorer_from_policy(cfg.policy, cfg.model, tokenizer, seed, device)
            with torch.no_grad():  # values start at 0: those of a random head would be noise
                for weight in scalar_head(unwrap(self.model)).parameters():
                    weight.zero_()
        else:
            self.mean, self.std = start.mean, start.std
            self.model = load_scorer(start.path, cfg.model, tokenizer, device)
            check_critic(session, start, self.model, policy)
        if cfg.hardware.gradient_checkpointing:
            recompute_activations(self.model)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw outputs of the head in the units of the reward."""
        return (raw - self.mean) / self.std


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


def collect(
    rollouts: list[Rollout],
    scores: Tensor,
    policy: Policy,
    reference: Reference,
    critic: Critic,
    kl_coef: float,
    cfg: Ppo,
) -> tuple[list[Experience], Metrics, list[float]]:
    """Advantages and returns of a batch of rollouts, its metrics, and each rollout's KL."""
    algo, hardware = cfg.algo, cfg.hardware
    sequences = [rollout.tokens for rollout in rollouts]
    old = logprobs_of(policy.model, sequences, hardware, algo.temperature)
    with reference.active() as frozen:
        ref = logprobs_of(frozen, sequences, hardware, algo.temperature)
    values = [critic.normalise(raw) for raw in values_of(critic.model, sequences, hardware)]

    lengths = torch.tensor([len(tokens.response) for tokens in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T), response tokens only
    grids = [pad_sequence(rows, batch_first=True) for rows in (old, ref, values)]  # (B, T) each
    rewards = kl_shaped_rewards(at_last(scores, mask), grids[0], grids[1], mask, kl_coef)
    advantages, returns = gae(rewards, grids[2], mask, algo.gamma, algo.lam)
    if algo.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    experience = [
        Experience(tokens, old[i], values[i], advantages[i, :n], returns[i, :n])
        for i, (tokens, n) in enumerate(zip(sequences, lengths.tolist(), strict=True))
    ]
    kls = (k1(grids[0], grids[1]) * mask).sum(-1)  # (B,)
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "kl": kls.mean().item(),
        "rlhf_reward": (scores - kl_coef * kls).mean().item(),
        "length": lengths.float().mean().item(),
        "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
        "value": torch.cat(values).mean().item(),
        "return": (returns * mask).sum().item() / int(lengths.sum()),
    }
    return experience, metrics, kls.tolist()


def response_tokens(items: list[Experience]) -> int:
    """Tokens over which a minibatch's losses are averaged."""
    return sum(len(item.tokens.response) for item in items)


def next_kl_coef(kl_coef: float, kl: float, algo: PpoAlgo) -> float:
    """The controller's coefficient for the next iteration."""
    if algo.kl_controller == "fixed":
        return kl_coef
    assert algo.kl_target is not None
    if algo.kl_controller == "schulman":
        return schulman_kl_coef(kl_coef, kl, algo.kl_target)
    assert algo.kl_horizon is not None
    return ziegler_kl_coef(kl_coef, kl, algo.kl_target, algo.batch_size, algo.kl_horizon)
