"""GRPO and its family: groups of responses to each prompt take the place of a critic.

    A_i = (r_i - mean r) / std r                      within the G responses to a prompt
    L = 1/B sum_i 1/len_i sum_t [ -min(w A_i, clip(w) A_i) + kl_coef KL(pi || ref) ]

(2402.03300 eq. 3 and sec. 4.1.2, w = pi / pi_old). Groups are sampled from the old policy; a group
of equal rewards is worth exactly 0. The paper's KL term differentiates k3, whose gradient is that
of KL(ref || pi); by default it carries the ratio w here, so that its gradient is that of
KL(pi || ref).

Its relatives differ in a line each. grpo_process: rewards of steps, summed from a token on (sec.
4.1.3). rloo: the mean of the others as baseline, the KL in the reward (2402.14740). reinforce_pp:
single responses, advantages whitened over the batch (2501.03262). dr_grpo: no division by length
or deviation (2503.20783). dapo: mean over tokens, a higher upper clip, groups of equal rewards
sampled anew (2503.14476). gspo: the ratio of whole responses (2507.18071). cispo: clipped weights
(2506.13585).

    rlhf-cli grpo policy=runs/demo/sft data=gsm8k data.path=train.jsonl reward=exact_answer
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema.algorithms import GrpoAlgo
from rlhf_cli.config.schema.stages import GrpoConfig
from rlhf_cli.data.batches import draw
from rlhf_cli.data.items import EncodedPrompt, response_tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.store import Mapped
from rlhf_cli.evaluation.figures import held_out_loss
from rlhf_cli.models.forward import on_grid, token_logprobs
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.objectives import policy_gradient
from rlhf_cli.objectives.advantages import (
    at_last,
    group_advantages,
    group_centred,
    kl_shaped_rewards,
    leave_one_out,
    process_advantages,
    returns_to_go,
)
from rlhf_cli.objectives.kl import k3, kl_loss, linear
from rlhf_cli.objectives.likelihood import masked_whiten
from rlhf_cli.objectives.moments import RunningMoments
from rlhf_cli.objectives.rounding import differ
from rlhf_cli.online.experience import Experience, check_first_ratio, measure
from rlhf_cli.online.monitor import Monitor, in_short, prompts_to_monitor
from rlhf_cli.online.refresh import RewardRefresh
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
from rlhf_cli.runs.weights import tensors_of
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer


def run(cfg: GrpoConfig, plan: Plan | None = None) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    algo = cfg.algo
    roles = load_roles(session)
    policy = roles.policy
    data = session.data.tokenised(policy.encoder, Prompt)
    prompts, rows = data.train, Mapped(data.train, itemgetter(0))
    roles.reward.check(rows, session.require)
    held_out = prompts_to_monitor(cfg, session, roles, data.held_out)
    unseen = list(session.data.texts(policy.encoder).held_out)
    session.note(data.notes, data)
    refresh = None
    if algo.refresh_reward:
        refresh = RewardRefresh(cfg, session, policy, roles.reward, rows)

    networks = {"policy": policy.model}
    planned = algo.steps * (algo.batch_size // algo.minibatch_size) * algo.epochs
    optimizer = Optimizer({"policy": (policy.model, algo.rate)}, algo, planned, cfg.hardware)
    state, tensors = session.resume(networks, optimizer)
    running = RunningMoments(**state.get("running", {}))
    roles.reference.load(tensors_of(tensors, "reference"))
    if refresh:
        refresh.load(state, tensors)
    monitor = Monitor(cfg, session, roles, held_out, state, tensors)
    objective = GrpoObjective(cfg, roles)

    with Bar("grpo", algo.steps) as bar:
        for step in session.steps(bar):
            clock = Clock()
            policy.engine.update(policy.model)
            kl_coef = linear(algo.kl_coef, algo.kl_coef_end, step, algo.steps)
            temperature = linear(algo.temperature, algo.temperature_end, step, algo.steps)
            sample = partial(sampled_groups, cfg, roles, prompts, running, clock, step, temperature)
            experience = sample(algo.batch_size)
            metrics = {**experience.metrics(kl_coef), **roles.reward.metrics(experience.scores)}
            metrics |= equal_groups(experience, algo)
            if step == 1:
                check_first_ratio(session, policy, experience, temperature)
            if refresh:
                metrics |= refresh.collect(step, experience.rollouts)
            stop = monitor.before_updates(step, metrics)
            groups: list[list[Trajectory]] = []
            if not stop:
                learnt, counts = resampled(experience, sample, algo)
                groups, metrics = trajectories_of(learnt, kl_coef, algo), metrics | counts

            coefs = Coefficients(kl_coef, temperature)
            updates = objective.updates(minibatches(groups, algo, cfg.seed, step), coefs)
            items = [item for group in groups for item in group]
            metrics |= take_steps(optimizer, updates, monitor.written, items)
            metrics |= experience.as_trained(items, kl_coef) | roles.correction.metrics(items)
            metrics |= {"kl_coef": kl_coef, "temperature": temperature}
            if algo.refresh_reference and step % algo.refresh_reference == 0 and not stop:
                roles.reference.refresh()
            clock.lap("updates")
            if refresh and refresh.is_time(step) and not stop:
                metrics |= refresh.train(step)
                clock.lap("refresh")

            stop = monitor.end_of_step(step, experience, items, metrics, clock, stop)
            bar.advance(0, in_short(metrics))
            if stop:
                break
            kept = {"running": asdict(running), **monitor.state()}
            weights = monitor.tensors() | reference_tensors(roles)
            if refresh:
                kept, weights = kept | refresh.state(), weights | refresh.tensors()
            session.save(step, networks, optimizer, kept, weights)

    check_reference(session, roles.reference)
    if refresh:
        refresh.write()
    drawn = draw(prompts, algo.batch_size, cfg.seed, "prompts", algo.steps)
    final = monitor.finish(drawn, ("equal_groups",))
    if unseen:
        final |= held_out_loss("text/loss", policy.model, unseen, cfg.hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final, **monitor.ending())


# --------------------------------------------------------------------------- the objective


class GrpoObjective:
    """The loss of policy, KL and entropy, per response or, with aggregate=token_mean, per token."""

    def __init__(self, cfg: GrpoConfig, roles: Roles) -> None:
        self._algo, self._hardware = cfg.algo, cfg.hardware
        self._policy, self._reference, self._own = roles.policy.model, roles.reference, roles.loss
        self._correction = roles.correction
        self._layout = layout_of(self._policy, cfg.hardware)

    def updates(
        self, parts: Iterable[tuple[int, list[list[Trajectory]]]], coefs: Coefficients
    ) -> Iterator[tuple[int, list[LossTerm]]]:
        """The terms of each minibatch of groups that has something to learn from."""
        for number, groups in parts:
            if items := [item for group in groups for item in group]:
                yield number, self.terms(items, coefs)

    def terms(self, minibatch: list[Trajectory], coefs: Coefficients) -> list[LossTerm]:
        """The one term of an optimizer step."""
        count = len(minibatch)
        if self._algo.aggregate == "token_mean":
            count = response_tokens([item.tokens for item in minibatch])
        loss = partial(self.loss, coefs=coefs)
        return [LossTerm.of(minibatch, loss, count, self._hardware, self._layout)]

    def loss(self, items: list[Trajectory], coefs: Coefficients) -> Loss:
        """Of a micro-batch, summed over responses or tokens: policy, KL and entropy."""
        algo = self._algo
        batch = batch_of(self._policy, [item.tokens for item in items], self._layout)
        mask = batch.response
        in_loss = algo.kl_in == "loss" and coefs.kl_coef > 0
        scored = token_logprobs(
            self._policy,
            batch,
            chunk=self._hardware.logits_at_once,
            temperature=coefs.temperature,
            with_entropy=algo.entropy_coef > 0,
            reference=self._reference if in_loss and algo.kl_estimator == "full" else None,
        )
        new = scored.logprobs  # (B, T)
        known = new.flatten()[batch.scored]  # (N,)
        keep_gaps(items, known)
        before = old_logprobs(items, known)
        old = on_grid(mask, before, batch.scored)
        factors = on_grid(mask, self._correction.weights(items, before), batch.scored)
        advantages = on_grid(mask, flat(items, "advantages", new), batch.scored)
        ref = old
        if items[0].reference is not None:
            ref = on_grid(mask, flat(items, "reference", new), batch.scored)
        if self._own is not None:
            total, metrics = own_policy_loss(self._own, new, old, ref, advantages, mask, algo)
        else:
            total, metrics = policy_loss(new, old, advantages, mask, algo)
        total = total * factors
        losses = {"loss/policy": total}
        if in_loss:
            losses["loss/kl"] = kl_loss(algo.kl_estimator, new, old, ref, scored.kl, factors)
            total = total + coefs.kl_coef * losses["loss/kl"]
        if scored.entropy is not None:
            losses["loss/entropy"] = scored.entropy
            total = total - algo.entropy_coef * scored.entropy
        weigh = partial(policy_gradient.token_weights, mask)
        weights = weigh(algo.aggregate, algo.sampled_tokens).to(new)  # (B, T)
        sums = {name: (value.detach() * weights).sum() for name, value in losses.items()}
        per_token = algo.aggregate == "token_mean"
        shares = weigh("token_mean" if per_token else "response_mean", 1).to(new)
        metrics["old_kl"] = k3(old, new)
        sums |= {name: (value.detach() * shares).sum() for name, value in metrics.items()}
        return (total * weights).sum(), sums


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, algo: GrpoAlgo
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) losses of algo.loss, and where the ratio was clipped, if it has one."""
    if algo.loss == "policy_gradient":
        return policy_gradient.policy_gradient_loss(new, advantages), {}
    log_ratio = new - old
    if algo.loss == "sequence_clip":
        log_ratio = policy_gradient.sequence_log_ratio(new, old, mask)
    clips = policy_gradient.clipped(log_ratio, algo.clip, algo.clip_high)
    if algo.loss == "cispo":
        assert algo.clip_high is not None
        limits = algo.clip, algo.clip_high
        losses = policy_gradient.cispo_loss(new, old, advantages, *limits)
    else:
        assert algo.clip is not None
        bounds = algo.clip, algo.clip_high, algo.dual_clip
        losses = policy_gradient.clipped_policy_loss(log_ratio, advantages, *bounds)
    return losses, {"clip_fraction": clips}


# --------------------------------------------------------------------------- items


def sampled_groups(
    cfg: GrpoConfig,
    roles: Roles,
    prompts: Sequence[EncodedPrompt],
    running: RunningMoments,
    clock: Clock,
    step: int,
    temperature: float,
    count: int,
    again: int = 0,
) -> Experience:
    """Scored groups of responses to `count` prompts of an iteration.

    Args:
        again: how many rounds of dynamic sampling there were before.
    """
    algo = cfg.algo
    stream = f"refill {again}" if again else "prompts"  # seeds: a run must go on with its draws
    rollouts = roles.policy.engine.sample(
        draw(prompts, algo.batch_size, cfg.seed, stream, step - 1)[:count],
        Sampling(algo.sampled_tokens, temperature),
        samples=algo.group_size,
        seed=derived_seed(cfg.seed, stream if again else "rollout", step),
    )
    clock.lap("rollouts")
    experience = measure(rollouts, roles, cfg, temperature, running, roles.needs)
    clock.lap("scores")
    return experience


def resampled(
    experience: Experience, sample: Callable[..., Experience], algo: GrpoAlgo
) -> tuple[Experience, Metrics]:
    """The groups that teach something, with others in place of the rest (DAPO's dynamic sampling).

    Args:
        sample: number of groups, and of rounds before -> groups of prompts drawn anew.
    """
    if not algo.dynamic_sampling:
        return experience, {}
    size = algo.group_size
    learnt = experience.groups(unequal_groups(experience, algo), size)
    sampled = algo.batch_size
    for again in range(1, algo.dynamic_sampling + 1):
        missing = algo.batch_size - len(learnt.rollouts) // size
        if not missing:
            break
        more = sample(missing, again)
        learnt = learnt.joined(more.groups(unequal_groups(more, algo), size))
        sampled += missing
    groups = float(len(learnt.rollouts) // size)
    return learnt, {"learnt_groups": groups, "sampled_groups": float(sampled)}


def equal_groups(experience: Experience, algo: GrpoAlgo) -> Metrics:
    """The share of groups whose rewards are all the same; nothing where groups are single."""
    if algo.group_size == 1:
        return {}
    return {"equal_groups": 1 - len(unequal_groups(experience, algo)) / algo.batch_size}


def unequal_groups(experience: Experience, algo: GrpoAlgo) -> list[int]:
    """The groups that teach something: rewards, of responses or steps, that are not all EQUAL.

    What responses are charged for their length or end makes no group unequal. Of a group whose
    responses are all left out nothing is learnt either.
    """
    size, rewards = algo.group_size, experience.rewards
    usable = experience.learnable(algo.mask_truncated)
    unequal = []
    for start in range(0, len(usable), size):
        places = slice(start, start + size)
        each = [rewards.uncharged[places]]
        if rewards.steps is not None:
            each.append(torch.cat(rewards.steps[places]))
        if any(usable[places]) and any(bool(differ(values)) for values in each):
            unequal.append(start // size)
    return unequal


def trajectories_of(
    experience: Experience, kl_coef: float, algo: GrpoAlgo
) -> list[list[Trajectory]]:
    """The responses of each group that can be learnt from, with their advantages."""
    if not experience.rollouts:
        return []
    advantages = advantages_of(experience, kl_coef, algo)
    usable = experience.learnable(algo.mask_truncated)
    columns = zip(experience.rollouts, experience.logprobs(), advantages, usable, strict=True)
    items = [
        Trajectory(rollout.tokens, *logprobs, worth) if learn else None
        for rollout, logprobs, worth, learn in columns
    ]
    size = algo.group_size
    return [
        [item for item in items[start : start + size] if item is not None]
        for start in range(0, len(items), size)
    ]


def advantages_of(experience: Experience, kl_coef: float, algo: GrpoAlgo) -> list[Tensor]:
    """Per response the (len(response),) advantages of its tokens."""
    size, rewards = algo.group_size, experience.rewards
    lengths = [len(rollout.tokens.response) for rollout in experience.rollouts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T)
    charged = kl_coef if algo.kl_in == "reward" else 0.0
    if algo.baseline == "none":  # each token is worth what comes from it on, its own KL included
        columns = experience.old, experience.reference or experience.old
        old, ref = (pad_sequence(rows, batch_first=True) for rows in columns)
        total = rewards.whole.nan_to_num(0.0)  # without a reward nothing is learnt from it
        shaped = kl_shaped_rewards(at_last(total, mask), old, ref, mask, charged)
        grid = returns_to_go(shaped, mask, 1.0)
    else:
        compare = {"group": group_advantages, "batch": group_centred, "none": group_centred}
        relative = compare[algo.normalise_advantages]
        if algo.baseline == "leave_one_out":
            relative = leave_one_out
        whole = rewards.whole
        if charged and experience.kls is not None:
            whole = whole - charged * experience.kls
        grouped = whole.view(-1, size)  # (P, G)
        grid = relative(grouped).flatten()[:, None] * mask
        if rewards.steps is not None:
            grid = grid + step_advantages(experience, lengths, algo)
    if algo.normalise_advantages == "batch":
        learnt = torch.tensor(experience.learnable(algo.mask_truncated))
        grid = masked_whiten(grid, mask & learnt[:, None])
    return [row[:length] for row, length in zip(grid, lengths, strict=True)]


def step_advantages(experience: Experience, lengths: list[int], algo: GrpoAlgo) -> Tensor:
    """(B, T) what the rewards of steps are worth at each token, group by group."""
    size, rewards = algo.group_size, experience.rewards
    assert rewards.steps is not None and rewards.ends is not None
    worths = []
    for start in range(0, len(lengths), size):
        places = slice(start, start + size)
        columns = rewards.steps[places], rewards.ends[places], lengths[places]
        worths += process_advantages(*columns, algo.normalise_advantages == "group")
    return pad_sequence(worths, batch_first=True)


def reference_tensors(roles: Roles) -> dict[str, Tensor]:
    """What a resume point keeps of a reference that was refreshed."""
    return {f"reference/{name}": each for name, each in roles.reference.tensors().items()}
