"""PPO and its family: reinforcement learning from a reward, as InstructGPT did it.

    maximise E[r(x, y) - kl_coef sum_t log(pi/ref)] + ptx_coef E_text[log pi]  (2203.02155 eq. 2)

Rollouts from the current policy are scored; each token is rewarded -kl_coef log(pi/ref), and the
last one the score as well. A critic that starts as the reward model gives advantages (GAE). Policy
and critic take clipped steps (1707.06347 eq. 7) over a few epochs of minibatches; with ptx_coef > 0
the gradient of plain text, a mean per token, joins each of these steps.

Its relatives differ in a line each. ppo_klpen: a penalty on KL(old || pi) in place of the clip
(1707.06347 eq. 8). a2c: -A log pi, the KL to the reference in the loss (2203.11147). reinforce:
returns less the mean return of the other responses, without a critic.

    rlhf-cli ppo algo=ppo_ptx policy=runs/demo/sft reward=runs/demo/reward
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema import PpoAlgo, PpoConfig
from rlhf_cli.data.batches import collate, cut
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed, draw, evenly, order_of
from rlhf_cli.data.rows import read_split, read_texts
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import response_nll, token_logprobs
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.models.score import logprobs_of, mean_nll
from rlhf_cli.objectives.advantages import (
    at_last,
    gae,
    kl_shaped_rewards,
    leave_one_out,
    returns_to_go,
)
from rlhf_cli.objectives.kl import k3, kl_loss, linear, schulman_kl_coef, ziegler_kl_coef
from rlhf_cli.objectives.likelihood import masked_scale, masked_whiten
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.objectives.policy_gradient import (
    clipped,
    clipped_policy_loss,
    clipped_value_loss,
    penalised_policy_loss,
    policy_gradient_loss,
)
from rlhf_cli.online.critic import Critic
from rlhf_cli.online.experience import Experience, measure, update_metrics
from rlhf_cli.online.monitor import Monitor, prompts_to_monitor
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.metrics import Clock
from rlhf_cli.rollout.rollouts import sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Roles, check_first_ratio, check_reference, load_roles
from rlhf_cli.runs.session import Session, begin
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer


@dataclass
class Item:
    """A rollout as the update sees it; every tensor is (len(response),)."""

    tokens: Tokens
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def source(self) -> str:
        """Where the row of its prompt stands, for messages."""
        return self.tokens.source


def run(cfg: PpoConfig) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo = cfg.algo
    roles = load_roles(session)
    policy = roles.policy
    critic = Critic(cfg, roles.reward, policy, session) if algo.baseline == "critic" else None

    rows = read_split(cfg.data, Prompt)
    prompts = list(zip(*policy.encoder.prompts(rows.train), strict=True))
    roles.reward.check(rows.train, session.require)
    held_out = prompts_to_monitor(cfg, session, roles, rows.held_out)
    plain = read_texts(cfg.data)
    texts, unseen = policy.encoder.texts(plain.train), policy.encoder.texts(plain.held_out)
    session.note(policy.encoder, rows.notes + plain.notes)

    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    networks = {"policy": policy.model} | ({"critic": critic.model} if critic else {})
    rates = {"policy": algo.lr, "critic": algo.value_lr or 0.0}
    trained = {name: (network, rates[name]) for name, network in networks.items()}
    optimizer = Optimizer(trained, algo, algo.steps * updates)
    state, tensors = session.resume(networks, optimizer)
    kl_coef = state.get("kl_coef", algo.kl_coef)
    running = RunningMoments(**state.get("running", {}))
    watch = Monitor(cfg, session, roles, held_out, state, tensors)
    objective = Objective(cfg, session, roles, critic, texts)
    objective.old_kl_coef = state.get("old_kl_coef", objective.old_kl_coef)

    with Bar("ppo", algo.steps) as bar:
        bar.skip(session.start)
        for step in range(session.start + 1, algo.steps + 1):
            clock = Clock()
            temperature = linear(algo.temperature, algo.temperature_end, step, algo.steps)
            if algo.kl_controller == "fixed":
                kl_coef = linear(algo.kl_coef, algo.kl_coef_end, step, algo.steps)
            rollouts = sample_rollouts(
                policy.model,
                policy.encoder,
                draw(prompts, algo.batch_size, cfg.seed, "prompts", step - 1),
                Sampling(algo.max_tokens, temperature),
                samples=1,
                seed=derived_seed(cfg.seed, "rollout", step),
                stop_ids=policy.stop_ids,
                hardware=cfg.hardware,
            )
            clock.lap("rollouts")
            found = measure(rollouts, roles, cfg, temperature, running)
            metrics = {**found.metrics(kl_coef), **roles.reward.metrics(found.scores)}
            if step == 1:
                check_first_ratio(session, policy.model, rollouts, temperature, metrics["kl"])
            stop = watch.before_updates(step, metrics)
            items = [] if stop else advantages_of(found, critic, kl_coef, session, cfg, metrics)
            clock.lap("scores")

            objective.kl_coef, objective.temperature = kl_coef, temperature
            updated = []
            for epoch in range(algo.epochs):
                order = order_of(len(items), cfg.seed, f"minibatches {step}", epoch)
                for i, picked in enumerate(evenly(order, algo.minibatch_size)):
                    update = (step - 1) * updates + epoch * (updates // algo.epochs) + i
                    parts = objective.parts([items[j] for j in picked], update)
                    updated.append(optimizer.step(parts))
                    if optimizer.stepped:
                        watch.written.after_update()
            metrics |= update_metrics(updated, found)
            metrics |= {"kl_coef": kl_coef, "temperature": temperature}
            kl_coef = next_kl_coef(kl_coef, metrics["kl"], algo)
            if algo.loss == "klpen" and items:
                metrics |= objective.steer(items)
            clock.lap("updates")

            stop = watch.end_of_step(step, found, metrics, clock, stop)
            bar.advance(1, f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.2f}")
            if stop:
                break
            kept = {
                "kl_coef": kl_coef,
                "old_kl_coef": objective.old_kl_coef,
                "running": asdict(running),
                **watch.state(),
            }
            session.save(step, networks, optimizer, kept, watch.tensors())

    check_reference(session, roles.reference)
    final = watch.finish(("reward", "kl", "entropy", "length", "kl_coef"))
    if unseen:
        final["text/loss"] = mean_nll(policy.model, unseen, cfg.hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final, **watch.ending())


def advantages_of(
    found: Experience,
    critic: Critic | None,
    kl_coef: float,
    session: Session,
    cfg: PpoConfig,
    metrics: Metrics,
) -> list[Item]:
    """The rollouts that can be learnt from, with advantages and returns.

    Adds to `metrics` what the critic said of them.
    """
    algo = cfg.algo
    places = [i for i, usable in enumerate(found.learnable(algo.mask_truncated)) if usable]
    if not places:
        return []
    sequences = [found.rollouts[i].tokens for i in places]
    values = (
        critic.values_of(sequences, session)
        if critic
        else [torch.zeros(len(tokens.response)) for tokens in sequences]
    )
    lengths = torch.tensor([len(tokens.response) for tokens in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T), response tokens only
    old, ref, value = (
        pad_sequence(rows, batch_first=True)  # (B, T) each
        for rows in ([found.old[i] for i in places], [found.reference[i] for i in places], values)
    )
    rewards = kl_shaped_rewards(
        reward_grid(found, places, mask), old, ref, mask, kl_coef if algo.kl_in == "reward" else 0.0
    )
    if algo.whiten_rewards:
        rewards = masked_scale(rewards, mask)
    if critic:
        advantages, returns = gae(rewards, value, mask, algo.gamma, algo.lam or 0.0)
        metrics["value"] = (value * mask).sum().item() / int(lengths.sum())
    else:
        returns = returns_to_go(rewards, mask, algo.gamma)
        advantages = returns - baseline_of(returns[:, 0], algo.baseline)[:, None] * mask
    metrics["return"] = (returns * mask).sum().item() / int(lengths.sum())
    if algo.normalise_advantages == "batch":
        advantages = masked_whiten(advantages, mask)
    return [
        Item(
            tokens,
            found.old[place],
            found.reference[place],
            values[i],
            advantages[i, :n],
            returns[i, :n],
        )
        for i, (place, tokens, n) in enumerate(
            zip(places, sequences, lengths.tolist(), strict=True)
        )
    ]


def reward_grid(found: Experience, places: list[int], mask: Tensor) -> Tensor:
    """(B, T) the reward of each response at its last token, and of each step at the step's last."""
    rewards = found.rewards
    grid = at_last(rewards.whole[places], mask)
    if rewards.steps is not None and rewards.ends is not None:
        for row, place in enumerate(places):
            steps = rewards.steps[place].nan_to_num(0.0)  # of a step that nothing judges
            grid[row].index_add_(0, torch.tensor(rewards.ends[place]), steps)
    return grid


def baseline_of(returns: Tensor, baseline: str) -> Tensor:
    """(B,) what is subtracted from the return of each response: that of the others, or nothing."""
    if baseline == "none" or len(returns) == 1:
        return torch.zeros_like(returns)
    return returns - leave_one_out(returns[None])[0]


class Objective:
    """The terms of one optimizer step.

    kl_coef, old_kl_coef, temperature: as they are in the current iteration.
    """

    def __init__(
        self,
        cfg: PpoConfig,
        session: Session,
        roles: Roles,
        critic: Critic | None,
        texts: list[Tokens],
    ) -> None:
        self._cfg, self._session = cfg, session
        self._policy, self._reference = roles.policy, roles.reference
        self._critic, self._texts = critic, texts
        self.kl_coef, self.temperature = cfg.algo.kl_coef, cfg.algo.temperature
        self.old_kl_coef = cfg.algo.old_kl_coef or 0.0

    def parts(self, minibatch: list[Item], update: int) -> list[LossTerm]:
        """The loss of a minibatch per token and, with ptx_coef, that of plain text.

        Args:
            update: the optimizer step, counted from 0, which fixes the draw of plain text.
        """
        algo, budget = self._cfg.algo, self._cfg.hardware.tokens_per_microbatch
        tokens = sum(len(item.tokens.response) for item in minibatch)
        lighter = partial(keys_that_help, self._cfg.hardware, logits=True, gradient=True)
        terms = [LossTerm(cut(minibatch, budget), self.rl_loss, tokens, keys_that_help=lighter)]
        if algo.ptx_coef:
            mix = draw(self._texts, algo.ptx_batch_size, self._cfg.seed, "ptx", update)
            count = sum(len(sequence.response) for sequence in mix)
            text = LossTerm(
                cut(mix, budget), self.ptx_loss, count, algo.ptx_coef, keys_that_help=lighter
            )
            terms.append(text)
        return terms

    def rl_loss(self, items: list[Item]) -> Loss:
        """Summed over tokens: policy, value, KL and entropy."""
        algo, critic = self._cfg.algo, self._critic
        batch = collate([item.tokens for item in items], self._session.device)
        exact = algo.kl_in == "loss" and algo.kl_estimator == "full" and self.kl_coef > 0
        scored = token_logprobs(
            self._policy.model,
            batch,
            chunk=self._cfg.hardware.logprob_chunk,
            temperature=self.temperature,
            with_entropy=algo.entropy_coef > 0,
            value_head=critic.head if critic else None,
            reference=self._reference if exact else None,
        )
        new = scored.logprobs[batch.response]  # (N,)
        old, ref, old_values, advantages, returns = (
            torch.cat([getattr(item, name) for item in items]).to(new)
            for name in ("old", "reference", "values", "advantages", "returns")
        )
        metrics = {"sampling_gap": (new - old).abs(), "old_kl": k3(old, new)}
        if algo.loss == "policy_gradient":
            total = policy_gradient_loss(new, advantages)
        elif algo.loss == "klpen":
            total = penalised_policy_loss(new, old, advantages, self.old_kl_coef)
        else:
            assert algo.clip is not None
            limits = algo.clip, algo.clip_high, algo.dual_clip
            total = clipped_policy_loss(new - old, advantages, *limits)
            metrics["clip_fraction"] = clipped(new - old, algo.clip, algo.clip_high)
        metrics["loss/policy"] = total
        if critic and algo.vf_coef is not None:
            values = critic.values(batch, scored.values)[batch.response]
            value_loss = clipped_value_loss(values, old_values, returns, algo.value_clip)
            total = total + algo.vf_coef * value_loss
            metrics["loss/value"] = value_loss
        if algo.kl_in == "loss" and self.kl_coef > 0:
            full = scored.kl[batch.response] if scored.kl is not None else None
            kl_term = kl_loss(algo.kl_estimator, new, old, ref, full)
            total = total + self.kl_coef * kl_term
            metrics["loss/kl"] = kl_term
        if scored.entropy is not None:
            entropy = scored.entropy[batch.response]
            total = total - algo.entropy_coef * entropy
            metrics["loss/entropy"] = entropy
        return total.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def ptx_loss(self, sequences: list[Tokens]) -> Loss:
        """Negative log-likelihood of plain text, summed over tokens."""
        chunk = self._cfg.hardware.logprob_chunk
        nll = response_nll(self._policy.model, sequences, chunk=chunk)
        return nll, {"loss/ptx": nll.detach()}

    def steer(self, items: list[Item]) -> Metrics:
        """Measure KL(old || new) per token after the updates, and let old_kl_coef follow it."""
        new = logprobs_of(
            self._policy.model,
            [item.tokens for item in items],
            self._cfg.hardware,
            self.temperature,
        )
        kl = k3(torch.cat([item.old for item in items]), torch.cat(new)).mean().item()
        found = {"old_kl_after": kl, "old_kl_coef": self.old_kl_coef}
        target = self._cfg.algo.old_kl_target
        if target is not None:
            self.old_kl_coef = schulman_kl_coef(self.old_kl_coef, kl, target)
        return found


def next_kl_coef(kl_coef: float, kl: float, algo: PpoAlgo) -> float:
    """The controller's coefficient for the next iteration."""
    if algo.kl_controller == "fixed":
        return kl_coef
    assert algo.kl_target is not None
    if algo.kl_controller == "schulman":
        return schulman_kl_coef(kl_coef, kl, algo.kl_target)
    assert algo.kl_horizon is not None
    return ziegler_kl_coef(kl_coef, kl, algo.kl_target, algo.batch_size, algo.kl_horizon)
