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

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema.algorithms import PpoAlgo
from rlhf_cli.config.schema.stages import PpoConfig
from rlhf_cli.data.batches import draw
from rlhf_cli.data.items import Tokens, response_tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.store import Mapped
from rlhf_cli.evaluation.figures import held_out_loss
from rlhf_cli.models.forward import on_grid, response_nll, token_logprobs
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives import policy_gradient
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
from rlhf_cli.online.critic import Critic
from rlhf_cli.online.experience import Experience, check_first_ratio, measure
from rlhf_cli.online.monitor import Monitor, in_short, prompts_to_monitor
from rlhf_cli.online.roles import Roles, load_roles
from rlhf_cli.online.updates import (
    Coefficients,
    Trajectory,
    flat,
    keep_gaps,
    minibatches,
    old_logprobs,
    own_policy_loss,
    take_steps,
)
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.metrics import Clock
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.policy import check_reference
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer
from rlhf_cli.training.own_loss import OwnLoss


def run(cfg: PpoConfig, plan: Plan | None = None) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    algo = cfg.algo
    roles = load_roles(session)
    policy = roles.policy
    critic = Critic(cfg, roles.reward, policy, session) if algo.baseline == "critic" else None
    data, texts = session.data.tokenised(policy.encoder, Prompt), session.data.texts(policy.encoder)
    prompts, unseen = data.train, list(texts.held_out)
    roles.reward.check(Mapped(prompts, itemgetter(0)), session.require)
    held_out = prompts_to_monitor(cfg, session, roles, data.held_out)
    session.note(data.notes + texts.notes, data)

    networks = {"policy": policy.model} | ({"critic": critic.model} if critic else {})
    rates = {"policy": algo.rate, "critic": algo.value_lr or 0.0}
    trained = {name: (network, rates[name]) for name, network in networks.items()}
    planned = algo.steps * (algo.batch_size // algo.minibatch_size) * algo.epochs
    optimizer = Optimizer(trained, algo, planned, cfg.hardware)
    state, tensors = session.resume(networks, optimizer)
    kl_coef = state.get("kl_coef", algo.kl_coef)
    old_kl_coef = state.get("old_kl_coef", algo.old_kl_coef or 0.0)
    running = RunningMoments(**state.get("running", {}))
    monitor = Monitor(cfg, session, roles, held_out, state, tensors)
    objective = PpoObjective(cfg, roles, critic, texts.train)

    with Bar("ppo", algo.steps) as bar:
        for step in session.steps(bar):
            clock = Clock()
            policy.engine.update(policy.model)
            temperature = linear(algo.temperature, algo.temperature_end, step, algo.steps)
            if algo.kl_controller == "fixed":
                kl_coef = linear(algo.kl_coef, algo.kl_coef_end, step, algo.steps)
            coefs = Coefficients(kl_coef, temperature, old_kl_coef)
            rollouts = policy.engine.sample(
                draw(prompts, algo.batch_size, cfg.seed, "prompts", step - 1),
                Sampling(algo.sampled_tokens, temperature),
                seed=derived_seed(cfg.seed, "rollout", step),
            )
            clock.lap("rollouts")
            experience = measure(rollouts, roles, cfg, temperature, running, roles.needs)
            metrics = {**experience.metrics(kl_coef), **roles.reward.metrics(experience.scores)}
            if step == 1:
                check_first_ratio(session, policy, experience, temperature)
            stop = monitor.before_updates(step, metrics)
            items: list[Trajectory] = []
            if not stop:
                items, seen = trajectories_of(experience, critic, kl_coef, cfg)
                metrics |= seen
            clock.lap("scores")

            parts = minibatches(items, algo, cfg.seed, step)
            updates = ((number, objective.terms(part, number, coefs)) for number, part in parts)
            metrics |= take_steps(optimizer, updates, monitor.written, items)
            metrics |= experience.as_trained(items, kl_coef) | roles.correction.metrics(items)
            metrics |= {"kl_coef": kl_coef, "temperature": temperature}
            kl_coef = next_kl_coef(kl_coef, metrics.get("kl", 0.0), algo)
            if algo.loss == "klpen" and items:
                moved = objective.old_kl(items, temperature)
                metrics |= {"old_kl_after": moved, "old_kl_coef": old_kl_coef}
                old_kl_coef = next_old_kl_coef(old_kl_coef, moved, algo)
            clock.lap("updates")

            stop = monitor.end_of_step(step, experience, items, metrics, clock, stop)
            bar.advance(0, in_short(metrics))
            if stop:
                break
            coefficients = {"kl_coef": kl_coef, "old_kl_coef": old_kl_coef}
            kept = {**coefficients, "running": asdict(running), **monitor.state()}
            session.save(step, networks, optimizer, kept, monitor.tensors())

    check_reference(session, roles.reference)
    drawn = draw(prompts, algo.batch_size, cfg.seed, "prompts", algo.steps)
    final = monitor.finish(drawn, ("kl_coef",))
    if unseen:
        final |= held_out_loss("text/loss", policy.model, unseen, cfg.hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final, **monitor.ending())


def next_kl_coef(kl_coef: float, kl: float, algo: PpoAlgo) -> float:
    """The controller's coefficient for the next iteration."""
    if algo.kl_controller == "fixed":
        return kl_coef
    assert algo.kl_target is not None
    if algo.kl_controller == "schulman":
        return schulman_kl_coef(kl_coef, kl, algo.kl_target)
    assert algo.kl_horizon is not None
    return ziegler_kl_coef(kl_coef, kl, algo.kl_target, algo.batch_size, algo.kl_horizon)


def next_old_kl_coef(old_kl_coef: float, old_kl: float, algo: PpoAlgo) -> float:
    """klpen: the weight for the next iteration, which follows KL(old || new) of this one."""
    if algo.old_kl_target is None:
        return old_kl_coef
    return schulman_kl_coef(old_kl_coef, old_kl, algo.old_kl_target)


# --------------------------------------------------------------------------- the objective


class PpoObjective:
    """The loss of policy and critic per token and, with ptx_coef, that of plain text."""

    def __init__(
        self,
        cfg: PpoConfig,
        roles: Roles,
        critic: Critic | None,
        texts: Sequence[Tokens],
    ) -> None:
        """`texts`: plain text for the pretraining mix."""
        self._algo, self._hardware, self._seed = cfg.algo, cfg.hardware, cfg.seed
        self._policy, self._reference, self._own = roles.policy.model, roles.reference, roles.loss
        self._critic, self._texts, self._correction = critic, texts, roles.correction
        self._layout = layout_of(self._policy, cfg.hardware)
        self._both = self._layout
        if critic and critic.head is None:  # perhaps of another architecture
            self._both = self._layout & layout_of(critic.model, cfg.hardware)

    def terms(
        self, minibatch: list[Trajectory], update: int, coefs: Coefficients
    ) -> list[LossTerm]:
        """The terms of an optimizer step.

        Args:
            update: its number, counted from 0, which fixes the draw of plain text.
        """
        algo, hardware = self._algo, self._hardware
        tokens = response_tokens([item.tokens for item in minibatch])
        loss = partial(self.loss, coefs=coefs)
        terms = [LossTerm.of(minibatch, loss, tokens, hardware, self._both)]
        if algo.ptx_coef:
            mix = draw(self._texts, algo.ptx_batch_size, self._seed, "ptx", update)
            count, weight = response_tokens(mix), algo.ptx_coef
            term = LossTerm.of(mix, self.ptx_loss, count, hardware, self._layout, weight=weight)
            terms.append(term)
        return terms

    def loss(self, items: list[Trajectory], coefs: Coefficients) -> Loss:
        """Of a micro-batch, summed over tokens: policy, value, KL and entropy."""
        algo, critic = self._algo, self._critic
        batch = batch_of(self._policy, [item.tokens for item in items], self._both)
        in_loss = algo.kl_in == "loss" and coefs.kl_coef > 0
        scored = token_logprobs(
            self._policy,
            batch,
            chunk=self._hardware.logits_at_once,
            temperature=coefs.temperature,
            with_entropy=algo.entropy_coef > 0,
            value_head=critic.head if critic else None,
            reference=self._reference if in_loss and algo.kl_estimator == "full" else None,
        )
        new = scored.logprobs.flatten()[batch.scored]  # (N,)
        keep_gaps(items, new)
        old = old_logprobs(items, new)
        if self._own is not None:
            total, clips = self._own_loss(self._own, items, scored.logprobs, old, batch.response)
        else:
            total, clips = policy_loss(new, old, flat(items, "advantages", new), algo, coefs)
        metrics = {"old_kl": k3(old, new), **clips}
        weights = self._correction.weights(items, old)
        metrics["loss/policy"] = total = total * weights
        if critic and algo.vf_coef is not None:
            values = critic.values(batch, scored.values).flatten()[batch.scored]
            before, returns = flat(items, "values", new), flat(items, "returns", new)
            value_loss = policy_gradient.clipped_value_loss(
                values, before, returns, algo.value_clip
            )
            total = total + algo.vf_coef * value_loss
            metrics["loss/value"] = value_loss
        if in_loss:
            full = scored.kl.flatten()[batch.scored] if scored.kl is not None else None
            ref = flat(items, "reference", new)
            kl_term = kl_loss(algo.kl_estimator, new, old, ref, full, weights)
            total = total + coefs.kl_coef * kl_term
            metrics["loss/kl"] = kl_term
        if scored.entropy is not None:
            entropy = scored.entropy.flatten()[batch.scored]
            total = total - algo.entropy_coef * entropy
            metrics["loss/entropy"] = entropy
        return total.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def _own_loss(
        self, own: OwnLoss, items: list[Trajectory], new: Tensor, old: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(N,) the losses of all tokens by a function of the user's, from (B, T) log-probs.

        Args:
            old: (N,).
        """
        given = old if items[0].reference is None else flat(items, "reference", new)
        before, reference, advantages = (
            on_grid(mask, each) for each in (old, given, flat(items, "advantages", new))
        )
        losses, clips = own_policy_loss(own, new, before, reference, advantages, mask, self._algo)
        return losses[mask], {name: value[mask] for name, value in clips.items()}

    def ptx_loss(self, sequences: list[Tokens]) -> Loss:
        """Negative log-likelihood of plain text, summed over tokens."""
        nll = response_nll(self._policy, sequences, self._hardware)
        return nll, {"loss/ptx": nll.detach()}

    def old_kl(self, items: list[Trajectory], temperature: float) -> float:
        """KL(old || new) per token in nats, of the policy as it is after the updates."""
        sequences = [item.tokens for item in items]
        new = torch.cat(logprobs_of(self._policy, sequences, self._hardware, temperature))
        return k3(flat(items, "old", new), new).mean().item()


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, algo: PpoAlgo, coefs: Coefficients
) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) losses of algo.loss, and where the ratio was clipped, if it is.

    Args:
        new, old, advantages: (N,) of all tokens.
    """
    if algo.loss == "policy_gradient":
        return policy_gradient.policy_gradient_loss(new, advantages), {}
    if algo.loss == "klpen":
        penalty = coefs.old_kl_coef
        return policy_gradient.penalised_policy_loss(new, old, advantages, penalty), {}
    assert algo.clip is not None
    limits = algo.clip, algo.clip_high, algo.dual_clip
    clips = policy_gradient.clipped(new - old, algo.clip, algo.clip_high)
    losses = policy_gradient.clipped_policy_loss(new - old, advantages, *limits)
    return losses, {"clip_fraction": clips}


# --------------------------------------------------------------------------- items


def trajectories_of(
    experience: Experience, critic: Critic | None, kl_coef: float, cfg: PpoConfig
) -> tuple[list[Trajectory], Metrics]:
    """The rollouts that can be learnt from, with advantages and returns, and what these are."""
    algo = cfg.algo
    usable = experience.learnable(algo.mask_truncated)
    places = [i for i, learnt in enumerate(usable) if learnt]
    if not places:
        return [], {}
    sequences = [experience.rollouts[i].tokens for i in places]
    lengths = torch.tensor([len(tokens.response) for tokens in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T), response tokens only
    values = (
        critic.values_of(sequences, cfg.hardware)
        if critic
        else [torch.zeros(len(tokens.response)) for tokens in sequences]
    )
    reference = experience.reference or experience.old
    columns = [experience.old[i] for i in places], [reference[i] for i in places], values
    old, ref, value = (pad_sequence(rows, batch_first=True) for rows in columns)  # (B, T) each
    charged = kl_coef if algo.kl_in == "reward" else 0.0
    grid = reward_grid(experience, places, mask)
    rewards = kl_shaped_rewards(grid, old, ref, mask, charged)
    if algo.whiten_rewards == "scale":
        rewards = masked_scale(rewards, mask)
    if algo.whiten_rewards == "whiten":
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    metrics: Metrics = {}
    if critic:
        advantages, returns = gae(rewards, value, mask, algo.gamma, algo.lam or 0.0)
        metrics["value"] = (value * mask).sum().item() / int(lengths.sum())
    else:
        returns = returns_to_go(rewards, mask, algo.gamma)
        advantages = returns - baseline_of(returns[:, 0], algo.baseline)[:, None] * mask
    metrics["return"] = (returns * mask).sum().item() / int(lengths.sum())
    if algo.normalise_advantages == "batch":
        advantages = masked_whiten(advantages, mask)
    logprobs = experience.logprobs()
    items = [
        Trajectory(
            tokens,
            *logprobs[place],
            advantages[i, :n],
            values=values[i],
            returns=returns[i, :n],
        )
        for i, (place, tokens, n) in enumerate(
            zip(places, sequences, lengths.tolist(), strict=True)
        )
    ]
    return items, metrics


def reward_grid(experience: Experience, places: list[int], mask: Tensor) -> Tensor:
    """(B, T) the reward of each response at its last token, and of each step at the step's last."""
    rewards = experience.rewards
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
