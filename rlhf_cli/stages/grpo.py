"""GRPO with outcome supervision: groups of responses take the place of a critic.

    A_i = (r_i - mean r) / std r                      within the G responses to a prompt
    L = 1/B sum_i 1/len_i sum_t [ -min(w A_i, clip(w) A_i) + kl_coef KL(pi || ref) ]

(2402.03300 eq. 3 and sec. 4.1.2, w = pi / pi_old). Groups are sampled from the old policy; a group
of equal rewards is worth exactly 0. The paper's KL term differentiates k3, whose gradient is that
of the forward KL; here it carries the ratio w, so that its gradient is that of KL(pi || ref).

    rlhf-cli grpo policy=runs/demo/sft data=gsm8k data.path=train.jsonl reward=exact_answer
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.config.schema import Grpo
from rlhf_cli.data.batches import collate, cut, derived_seed, draw, order_of
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.rows import read_split, read_texts
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of, mean_nll
from rlhf_cli.objectives.advantages import group_advantages
from rlhf_cli.objectives.kl import k1, weighted_k3
from rlhf_cli.objectives.policy_gradient import clipped_policy_loss
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.samples import known_or_none, show_samples
from rlhf_cli.rewards.sources import load_reward, scores_with_eos_rule
from rlhf_cli.rollout.rollouts import Rollout, sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.training.optimize import Loss, Metrics, Optimizer, Part, mean_metrics
from rlhf_cli.training.roles import Policy, check_first_ratio, check_reference, load_role
from rlhf_cli.training.session import begin


@dataclass
class Experience:
    """A response as the update sees it; old and reference are (len(response),)."""

    tokens: Tokens
    old: Tensor
    reference: Tensor
    advantage: float

    def __len__(self) -> int:
        return len(self.tokens)


def run(cfg: Grpo) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    policy = load_role(session, cfg.policy)
    reference = Reference(policy.model)
    reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
    rows = read_split(cfg.data, Prompt)
    reward.check(rows.train, session.require)
    prompts = list(zip(*policy.encoder.prompts(rows.train), strict=True))
    unseen = policy.encoder.texts(read_texts(cfg.data).held_out)
    session.note(policy.encoder, rows.notes)

    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    optimizer = Optimizer({"policy": (policy.model, algo.lr)}, algo, algo.steps * updates)
    state, _ = session.resume({"policy": policy.model}, optimizer)
    metrics = state.get("metrics", {})
    log, samples = session.log(), session.log("samples.jsonl")

    def loss(items: list[Experience]) -> Loss:
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
        old, ref = (
            torch.cat([getattr(item, name) for item in items]).to(new)
            for name in ("old", "reference")
        )
        lengths = batch.response.sum(-1)  # (B,)
        per_response = torch.tensor([item.advantage for item in items]).to(new)
        advantages = per_response.repeat_interleave(lengths)  # (N,)
        share = (1 / lengths).repeat_interleave(lengths)  # each response weighs 1
        policy_loss = clipped_policy_loss(new - old, advantages, algo.clip)
        kl_term = weighted_k3(new, old, ref)
        ratio = torch.exp(new - old).detach()
        metrics = {
            "loss/policy": policy_loss,
            "loss/kl": kl_term,
            "entropy": entropy,
            "clip_fraction": ((ratio - 1).abs() > algo.clip).float(),
        }
        total = ((policy_loss + algo.kl_coef * kl_term) * share).sum()
        return total, {name: (value.detach() * share).sum() for name, value in metrics.items()}

    with Bar("grpo", algo.steps) as bar:
        bar.advance(session.start)
        for step in range(session.start + 1, algo.steps + 1):
            rollouts = sample_rollouts(
                policy.model,
                policy.encoder,
                draw(prompts, algo.batch_size, cfg.seed, "prompts", step - 1),
                Sampling(algo.max_tokens, algo.temperature),
                samples=algo.group_size,
                seed=derived_seed(cfg.seed, "rollout", step),
                stop_ids=policy.stop_ids,
                hardware=hardware,
            )
            scores = scores_with_eos_rule(rollouts, reward, algo.missing_eos_reward)
            groups, metrics, kls = collect(rollouts, scores, policy, reference, cfg)
            if step == 1:
                check_first_ratio(session, policy.model, rollouts, algo.temperature, metrics["kl"])
            updated = []
            for epoch in range(algo.epochs):
                order = order_of(len(groups), cfg.seed, f"minibatches {step}", epoch)
                for start in range(0, len(order), algo.minibatch_size):
                    picked = order[start : start + algo.minibatch_size]
                    minibatch = [item for i in picked for item in groups[i]]
                    batches = cut(minibatch, hardware.tokens_per_microbatch)
                    updated.append(optimizer.step([Part(batches, loss, len(minibatch))]))
            metrics |= mean_metrics(updated)
            log.write(step, metrics)
            if step % algo.show_every == 0 or step in (1, algo.steps):
                show_samples(step, rollouts, known_or_none(scores), kls, samples)
            bar.advance(1, f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.2f}")
            session.save(step, {"policy": policy.model}, optimizer, {"metrics": metrics})

    check_reference(session, reference)
    final = {name: metrics[name] for name in ("reward", "kl", "entropy", "length", "equal_groups")}
    if unseen:
        final["text/loss"] = mean_nll(policy.model, unseen, hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final)


def collect(
    rollouts: list[Rollout], scores: Tensor, policy: Policy, reference: Reference, cfg: Grpo
) -> tuple[list[list[Experience]], Metrics, list[float]]:
    """Groups with their advantages, metrics of the batch, and each response's KL."""
    algo, hardware = cfg.algo, cfg.hardware
    sequences = [rollout.tokens for rollout in rollouts]
    old = logprobs_of(policy.model, sequences, hardware, algo.temperature)
    with reference.active() as frozen:
        ref = logprobs_of(frozen, sequences, hardware, algo.temperature)
    grouped = scores.view(-1, algo.group_size)  # (P, G)
    advantages = group_advantages(grouped).flatten().tolist()
    columns = zip(sequences, old, ref, advantages, strict=True)
    experience = [Experience(*column) for column in columns]
    groups = [
        experience[i : i + algo.group_size] for i in range(0, len(experience), algo.group_size)
    ]
    kls = [k1(ours, theirs).sum().item() for ours, theirs in zip(old, ref, strict=True)]
    lengths = [len(tokens.response) for tokens in sequences]
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "equal_groups": (grouped == grouped[:, :1]).all(-1).float().mean().item(),
        "kl": sum(kls) / len(kls),
        "length": sum(lengths) / len(lengths),
        "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
    }
    return groups, metrics, kls
