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

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_cli.config.schema import GrpoAlgo, GrpoConfig
from rlhf_cli.data.batches import collate, cut
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed, draw, evenly, order_of
from rlhf_cli.data.rows import read_split, read_texts
from rlhf_cli.data.tokens import Tokens
from rlhf_cli.models.forward import on_grid, token_logprobs
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.models.score import mean_nll
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
from rlhf_cli.objectives.policy_gradient import (
    cispo_loss,
    clipped,
    clipped_policy_loss,
    policy_gradient_loss,
    sequence_log_ratio,
    token_weights,
)
from rlhf_cli.online.experience import Experience, measure, update_metrics
from rlhf_cli.online.monitor import Monitor, prompts_to_monitor
from rlhf_cli.online.refresh import RewardRefresh
from rlhf_cli.reporting.console import Bar
from rlhf_cli.reporting.metrics import Clock
from rlhf_cli.rollout.rollouts import sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Roles, check_first_ratio, check_reference, load_roles
from rlhf_cli.runs.session import Session, begin, tensors_of
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer


@dataclass
class Item:
    """A response as the update sees it; every tensor is (len(response),)."""

    tokens: Tokens
    old: Tensor
    reference: Tensor
    advantages: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def source(self) -> str:
        """Where the row of its prompt stands, for messages."""
        return self.tokens.source


def run(cfg: GrpoConfig) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo = cfg.algo
    roles = load_roles(session)
    policy = roles.policy
    rows = read_split(cfg.data, Prompt)
    roles.reward.check(rows.train, session.require)
    held_out = prompts_to_monitor(cfg, session, roles, rows.held_out)
    prompts = list(zip(*policy.encoder.prompts(rows.train), strict=True))
    unseen = policy.encoder.texts(read_texts(cfg.data).held_out)
    session.note(policy.encoder, rows.notes)
    refresh = None
    if algo.refresh_reward:
        refresh = RewardRefresh(cfg, session, policy, roles.reward, rows.train)

    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    networks = {"policy": policy.model}
    optimizer = Optimizer({"policy": (policy.model, algo.lr)}, algo, algo.steps * updates)
    state, tensors = session.resume(networks, optimizer)
    running = RunningMoments(**state.get("running", {}))
    roles.reference.load(tensors_of(tensors, "reference"))
    if refresh:
        refresh.load(state, tensors)
    watch = Monitor(cfg, session, roles, held_out, state, tensors)
    objective = Objective(cfg, session, roles)

    def sample(
        step: int, temperature: float, clock: Clock, count: int, again: int = 0
    ) -> Experience:
        """Scored groups of responses to `count` prompts; `again` counts the refills."""
        stream = f"refill {again}" if again else "prompts"
        rollouts = sample_rollouts(
            policy.model,
            policy.encoder,
            draw(prompts, algo.batch_size, cfg.seed, stream, step - 1)[:count],
            Sampling(algo.max_tokens, temperature),
            samples=algo.group_size,
            seed=derived_seed(cfg.seed, stream if again else "rollout", step),
            stop_ids=policy.stop_ids,
            hardware=cfg.hardware,
        )
        clock.lap("rollouts")
        found = measure(rollouts, roles, cfg, temperature, running)
        clock.lap("scores")
        return found

    with Bar("grpo", algo.steps) as bar:
        bar.skip(session.start)
        for step in range(session.start + 1, algo.steps + 1):
            clock = Clock()
            kl_coef = linear(algo.kl_coef, algo.kl_coef_end, step, algo.steps)
            temperature = linear(algo.temperature, algo.temperature_end, step, algo.steps)
            found = sample(step, temperature, clock, algo.batch_size)
            metrics = {
                **found.metrics(kl_coef),
                **roles.reward.metrics(found.scores),
            }
            if algo.group_size > 1:
                unequal = len(unequal_groups(found, algo))
                metrics["equal_groups"] = 1 - unequal / algo.batch_size
            if step == 1:
                check_first_ratio(session, policy.model, found.rollouts, temperature, metrics["kl"])
            if refresh:
                metrics |= refresh.collect(step, found.rollouts)
            stop = watch.before_updates(step, metrics)
            learnt = found
            if algo.dynamic_sampling and not stop:
                more = partial(sample, step, temperature, clock)
                learnt, counts = refilled(found, more, algo)
                metrics |= counts

            groups = [] if stop else items_of(learnt, kl_coef, algo)
            objective.kl_coef, objective.temperature = kl_coef, temperature
            updated = []
            for epoch in range(algo.epochs):
                order = order_of(len(groups), cfg.seed, f"minibatches {step}", epoch)
                for picked in evenly(order, algo.minibatch_size):
                    minibatch = [item for i in picked for item in groups[i]]
                    if minibatch:
                        updated.append(optimizer.step([objective.part(minibatch)]))
                    if minibatch and optimizer.stepped:
                        watch.written.after_update()
            metrics |= update_metrics(updated, found)
            metrics |= {"kl_coef": kl_coef, "temperature": temperature}
            if algo.refresh_reference and step % algo.refresh_reference == 0 and not stop:
                roles.reference.refresh()
            clock.lap("updates")
            if refresh and algo.refresh_reward and step % algo.refresh_reward == 0 and not stop:
                metrics |= refresh.train(step)
                clock.lap("refresh")

            stop = watch.end_of_step(step, found, metrics, clock, stop)
            bar.advance(1, f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.2f}")
            if stop:
                break
            kept = {"running": asdict(running), **watch.state()}
            weights = watch.tensors()
            weights |= {f"reference/{k}": each for k, each in roles.reference.tensors().items()}
            if refresh:
                kept |= refresh.state()
                weights |= refresh.tensors()
            session.save(step, networks, optimizer, kept, weights)

    check_reference(session, roles.reference)
    if refresh:
        refresh.write()
    final = watch.finish(("reward", "kl", "entropy", "length", "equal_groups"))
    if unseen:
        final["text/loss"] = mean_nll(policy.model, unseen, cfg.hardware)
    return session.finish_model(policy.model, "policy", policy.encoder, final, **watch.ending())


def refilled(
    found: Experience, sample: Callable[[int, int], Experience], algo: GrpoAlgo
) -> tuple[Experience, Metrics]:
    """The groups that teach something, with others in place of the rest (DAPO's dynamic sampling).

    Args:
        sample: number of groups and round -> groups of prompts drawn anew.
    """
    size = algo.group_size
    learnt = found.groups(unequal_groups(found, algo), size)
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


def unequal_groups(found: Experience, algo: GrpoAlgo) -> list[int]:
    """The groups that teach something: rewards, of responses or steps, that are not all the same.

    What responses are charged for their length or end makes no group unequal. Of a group whose
    responses are all left out nothing is learnt either.
    """
    size, rewards = algo.group_size, found.rewards
    usable = found.learnable(algo.mask_truncated)
    unequal = []
    for start in range(0, len(usable), size):
        places = slice(start, start + size)
        each = [rewards.uncharged[places]]
        if rewards.steps is not None:
            each.append(torch.cat(rewards.steps[places]))
        known = [values[~values.isnan()] for values in each]
        if any(usable[places]) and any(bool((values != values[:1]).any()) for values in known):
            unequal.append(start // size)
    return unequal


def items_of(found: Experience, kl_coef: float, algo: GrpoAlgo) -> list[list[Item]]:
    """The responses of each group that can be learnt from, with their advantages."""
    if not found.rollouts:
        return []
    advantages = advantages_of(found, kl_coef, algo)
    usable = found.learnable(algo.mask_truncated)
    columns = zip(found.rollouts, found.old, found.reference, advantages, usable, strict=True)
    items = [
        Item(rollout.tokens, old, ref, worth) if learn else None
        for rollout, old, ref, worth, learn in columns
    ]
    size = algo.group_size
    return [
        [item for item in items[start : start + size] if item is not None]
        for start in range(0, len(items), size)
    ]


def advantages_of(found: Experience, kl_coef: float, algo: GrpoAlgo) -> list[Tensor]:
    """Per response the (len(response),) advantages of its tokens."""
    size, rewards = algo.group_size, found.rewards
    lengths = [len(rollout.tokens.response) for rollout in found.rollouts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T)
    charged = kl_coef if algo.kl_in == "reward" else 0.0
    if algo.baseline == "none":  # each token is worth what comes from it on, its own KL included
        old, ref = (pad_sequence(rows, batch_first=True) for rows in (found.old, found.reference))
        total = rewards.whole.nan_to_num(0.0)  # without a reward nothing is learnt from it
        shaped = kl_shaped_rewards(at_last(total, mask), old, ref, mask, charged)
        grid = returns_to_go(shaped, mask, 1.0)
    else:
        compare = {"group": group_advantages, "batch": group_centred, "none": group_centred}
        relative = compare[algo.normalise_advantages]
        if algo.baseline == "leave_one_out":
            relative = leave_one_out
        grouped = (rewards.whole - charged * found.kls).view(-1, size)  # (P, G)
        grid = relative(grouped).flatten()[:, None] * mask
        if rewards.steps is not None:
            grid = grid + step_advantages(found, lengths, algo)
    if algo.normalise_advantages == "batch":
        learnt = torch.tensor(found.learnable(algo.mask_truncated))
        grid = masked_whiten(grid, mask & learnt[:, None])
    return [row[:length] for row, length in zip(grid, lengths, strict=True)]


def step_advantages(found: Experience, lengths: list[int], algo: GrpoAlgo) -> Tensor:
    """(B, T) what the rewards of steps are worth at each token, group by group."""
    size, rewards = algo.group_size, found.rewards
    assert rewards.steps is not None and rewards.ends is not None
    worths = []
    for start in range(0, len(lengths), size):
        places = slice(start, start + size)
        columns = rewards.steps[places], rewards.ends[places], lengths[places]
        worths += process_advantages(*columns, algo.normalise_advantages == "group")
    return pad_sequence(worths, batch_first=True)


class Objective:
    """The loss of one optimizer step.

    kl_coef, temperature: as they are in the current iteration.
    """

    def __init__(self, cfg: GrpoConfig, session: Session, roles: Roles) -> None:
        self._cfg, self._session = cfg, session
        self._policy, self._reference = roles.policy, roles.reference
        self.kl_coef, self.temperature = cfg.algo.kl_coef, cfg.algo.temperature

    def part(self, minibatch: list[Item]) -> LossTerm:
        """The loss of a minibatch, per response or, with aggregate=token_mean, per token."""
        batches = cut(minibatch, self._cfg.hardware.tokens_per_microbatch)
        count = len(minibatch)
        if self._cfg.algo.aggregate == "token_mean":
            count = sum(len(item.tokens.response) for item in minibatch)
        lighter = partial(keys_that_help, self._cfg.hardware, logits=True, gradient=True)
        return LossTerm(batches, self.loss, count, keys_that_help=lighter)

    def loss(self, items: list[Item]) -> Loss:
        """Summed over responses or tokens: policy, KL and entropy."""
        algo = self._cfg.algo
        batch = collate([item.tokens for item in items], self._session.device)
        mask = batch.response
        in_loss = algo.kl_in == "loss" and self.kl_coef > 0
        exact = in_loss and algo.kl_estimator == "full"
        scored = token_logprobs(
            self._policy.model,
            batch,
            chunk=self._cfg.hardware.logprob_chunk,
            temperature=self.temperature,
            with_entropy=algo.entropy_coef > 0,
            reference=self._reference if exact else None,
        )
        new = scored.logprobs  # (B, T)
        old, ref, advantages = (
            on_grid(mask, torch.cat([getattr(item, name) for item in items]).to(new))
            for name in ("old", "reference", "advantages")
        )
        total, metrics = self.policy_loss(new, old, advantages, mask)
        losses = {"loss/policy": total}
        if in_loss:
            losses["loss/kl"] = kl_loss(algo.kl_estimator, new, old, ref, scored.kl)
            total = total + self.kl_coef * losses["loss/kl"]
        if scored.entropy is not None:
            losses["loss/entropy"] = scored.entropy
            total = total - algo.entropy_coef * scored.entropy
        weights = token_weights(mask, algo.aggregate, algo.max_tokens).to(new)  # (B, T)
        sums = {name: (value.detach() * weights).sum() for name, value in losses.items()}
        per_token = algo.aggregate == "token_mean"
        shares = token_weights(mask, "token_mean" if per_token else "response_mean", 1).to(new)
        metrics |= {"sampling_gap": (new - old).abs(), "old_kl": k3(old, new)}
        sums |= {name: (value.detach() * shares).sum() for name, value in metrics.items()}
        return (total * weights).sum(), sums

    def policy_loss(
        self, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T) losses of algo.loss, and where the ratio was clipped, if it has one."""
        algo = self._cfg.algo
        if algo.loss == "policy_gradient":
            return policy_gradient_loss(new, advantages), {}
        log_ratio = new - old
        if algo.loss == "sequence_clip":
            log_ratio = sequence_log_ratio(new, old, mask)
        metrics = {"clip_fraction": clipped(log_ratio, algo.clip, algo.clip_high)}
        if algo.loss == "cispo":
            assert algo.clip_high is not None
            return cispo_loss(new, old, advantages, algo.clip, algo.clip_high), metrics
        assert algo.clip is not None
        limits = algo.clip, algo.clip_high, algo.dual_clip
        return clipped_policy_loss(log_ratio, advantages, *limits), metrics
