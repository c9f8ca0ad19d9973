"""Direct preference optimisation and its family: feedback without a reward model.

With rho(y) = log pi(y|x) - log ref(y|x), h = rho(y_w) - rho(y_l), and h-bar from means per token:

    dpo                - log s(beta h), label smoothing as in cDPO           2305.18290 eq. 7
    length_normalised  - log s(beta h-bar)                                   2411.15124
    robust             cDPO's loss with a minus sign, over 1 - 2e            2403.00409
    ipo, ipo_mean      (h - 1 / (2 tau))^2, (h-bar - 1 / (2 tau))^2          2310.12036 eq. 17
    hinge              relu(1 - beta h)                                      2305.10425, 2309.06657
    plackett_luce      whole rankings, of scores beta rho                    2305.18290 App. A.3
    kto                w (1 - s(+-beta (rho - z0))), thumbs, unpaired        2402.01306
    orpo, simpo        odds ratio, or margin, of mean log-probs; no ref      2403.07691, 2405.14734
    preferred_ft       SFT on the chosen side                                2305.18290 sec. 6
    unlikelihood       - log pi(y_w) + alpha log pi(y_l)                     2305.18290 sec. 6

plus sft_coef times the NLL per token of chosen responses. Where the chosen side of a pair is
better only with chance p (soft_labels), dpo has the cross-entropy with p, ipo the target (2p - 1)
/ (2 tau), and their means per token the same. The reference is the policy as it starts, another
folder, or the policy after SFT on the chosen side (reference=bootstrap). Where policy and
reference start as one, every rho is 0 at first; the stage stops where it is not.

    rlhf-cli dpo policy=runs/demo/sft data=hh data.path=hh.jsonl algo.beta=0.1
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.config.schema.algorithms import DpoAlgo
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.stages import DpoConfig
from rlhf_cli.data.batches import doubts_of, rankings_of
from rlhf_cli.data.items import responses_in
from rlhf_cli.data.store import by_source
from rlhf_cli.data.transfer import tensor_on, to_device
from rlhf_cli.evaluation import judging, report
from rlhf_cli.models.forward import on_grid, token_logprobs
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.objectives import preference, reward_model
from rlhf_cli.preferences.implicit_reward import (
    implicit_rewards,
    manifest_entries,
    per_response,
    reward_scale,
)
from rlhf_cli.preferences.items import (
    PreferenceItem,
    PreferenceItems,
    class_weights,
    good_sequences,
    items_of,
)
from rlhf_cli.preferences.reference import (
    FrozenReference,
    log_ratios,
    sequence_logprobs,
)
from rlhf_cli.reporting.console import Bar
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.policy import policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer
from rlhf_cli.training.own_loss import OwnLoss, own_loss_of


def run(cfg: DpoConfig, plan: Plan | None = None) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    algo, hardware, own = cfg.algo, cfg.hardware, own_loss_of(cfg)
    policy = policy_of(session, cfg.policy)
    data = session.data.judged(policy.encoder)
    train = items_of(data.train, cfg, "training")
    unseen = PreferenceItems(data.held_out, cfg, "held-out")
    weights = class_weights(train, algo)
    session.note(data.notes, data)
    reference = FrozenReference(session, policy, cfg, train)
    held_out = reference.precompute(train, unseen)

    batches = session.data.batches(train, algo.batch_size, algo.epochs, "dpo", algo.max_steps)
    optimizer = Optimizer({"policy": (policy.model, algo.rate)}, algo, len(batches), hardware)
    best = Best(policy.model, *session.resume({"policy": policy.model}, optimizer))
    objective = DpoObjective(policy.model, algo, hardware, weights, own)
    sampled_kl = partial(reference.sampled_kl, policy, data.held_out)
    parts = by_source(data.held_out, held_out)
    evaluate = partial(evaluated, objective, held_out, parts, sampled_kl)
    log = session.log()
    if session.start == 0 and reference.is_start:
        reference.check_start(session, policy, held_out, evaluate())

    with Bar("dpo", len(batches)) as bar:
        for step in session.steps(bar):
            batch = batches[step - 1]
            reference.score(batch)
            whole = objective.batchwise(batch)
            metrics = by_class(optimizer.step([objective.term(batch, whole)]), batch)
            if algo.loss == "kto":
                metrics["z0"] = whole.z0
            metrics |= session.cost(batch)
            if step % algo.eval_every == 0 or step == len(batches):
                metrics |= evaluate()
                loss, hits = metrics["eval/loss"], metrics["eval/rewards/accuracy"]
                bar.advance(0, f"held-out loss {loss:.3f}  accuracy {hits:.3f}")
                if algo.keep == "best":
                    best.offer(-loss)
            log.write(step, metrics)
            session.snapshot(step, policy.model, policy.encoder)
            session.save(step, {"policy": policy.model}, optimizer, best.state(), best.weights)
    best.put()
    session.settle(policy.model)
    rewards = implicit_rewards(objective.logprobs(held_out), held_out, algo)
    judgement = judging.judge([item.answers for item in held_out], rewards)
    final = {**judging.figures(judgement), **evaluate()}  # eval/loss is the objective's
    reference.check_unchanged(session)
    title = f"{cfg.out}, held-out rows"
    return session.finish_model(
        policy.model,
        "policy",
        policy.encoder,
        final,
        write_beside=partial(report.write_judgement, report=judgement, title=title),
        **manifest_entries(rewards, held_out, algo, reference.origin, session.out),
    )


# --------------------------------------------------------------------------- the objective


@dataclass
class Batchwise:
    """What one item's loss needs to know of all items of its optimizer step.

    z0: kto's baseline in nats.
    nll_scale: items per token of a good response; sums of NLL times it have the mean per token.
    """

    z0: float
    nll_scale: float


class DpoObjective:
    """The preference loss of judged responses, a mean over items."""

    def __init__(
        self,
        policy: nn.Module,
        algo: DpoAlgo,
        hardware: Hardware,
        weights: tuple[float, float],
        own: OwnLoss | None,
    ) -> None:
        """`weights`: kto's lambda_D, lambda_U. `own`: the user's loss, if algo.loss names one."""
        self._policy, self._algo, self._hardware = policy, algo, hardware
        self._weights, self._own = weights, own
        self._layout = layout_of(policy, hardware)

    def batchwise(self, items: list[PreferenceItem]) -> Batchwise:
        """Over all items of a step, so that no cut into micro-batches changes the loss."""
        tokens = sum(len(sequence.response) for sequence in good_sequences(items))
        scale = len(items) / tokens if tokens else 0.0
        mismatched = [item.mismatched for item in items if item.mismatched is not None]
        if not mismatched:
            return Batchwise(0.0, scale)
        rho = log_ratios(self._policy, mismatched, self._hardware)
        return Batchwise(preference.kto_baseline(rho).item(), scale)

    def term(self, items: list[PreferenceItem], whole: Batchwise) -> LossTerm:
        """The loss of an optimizer step, or of an evaluation."""
        loss = partial(self.loss, whole=whole)
        return LossTerm.of(items, loss, len(items), self._hardware, self._layout)

    def loss(self, items: list[PreferenceItem], whole: Batchwise) -> Loss:
        """Of a micro-batch, summed over items."""
        batch = batch_of(self._policy, [item.answers for item in items], self._layout)
        chunk = self._hardware.logits_at_once
        grid = token_logprobs(self._policy, batch, chunk=chunk).logprobs  # (S, R)
        logprobs, lengths = grid.sum(-1), batch.response.sum(-1)  # (S,)
        known = [item.reference for item in items if item.reference is not None]
        ref = torch.zeros_like(logprobs)
        if known:
            ref = to_device(torch.cat(known).to(logprobs.dtype), logprobs.device)
        both = comparison_of(logprobs, ref, lengths, items, self._algo, whole)
        if self._own is not None:
            losses = own_losses(self._own, both, ref, lengths)
        else:
            losses = preference_losses(both, items, self._algo, whole, self._weights)
        if self._algo.sft_coef:
            losses = losses + self._algo.sft_coef * both.nll
        metrics = metrics_of(both, self._algo, whole)
        return losses.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def logprobs(self, items: list[PreferenceItem]) -> list[Tensor]:
        """Per item the (K,) log-probs of its responses under the policy, without gradient."""
        return sequence_logprobs(self._policy, items, self._hardware)


@dataclass
class Comparison:
    """A micro-batch of N items with S responses as the losses read it, item by item.

    logprobs, rho: (S,) log pi, and log pi - log ref as the loss reads it (sums or means).
    best, worst: (N,) the places of the best and the worst response of each item.
    good: (N,) bool, whether the best is a response to imitate: kto's bad ones are not.
    nll: (N,) of the best, where it is good; its mean is the NLL per token.
    doubt: the chance that the best is not the better one: of each, (N,), or of all.
    """

    logprobs: Tensor
    rho: Tensor
    best: Tensor
    worst: Tensor
    good: Tensor
    nll: Tensor
    doubt: Tensor | float

    @property
    def h(self) -> Tensor:
        """(N,) rho_w - rho_l."""
        return self.rho[self.best] - self.rho[self.worst]


def comparison_of(
    logprobs: Tensor,
    reference: Tensor,
    lengths: Tensor,
    items: list[PreferenceItem],
    algo: DpoAlgo,
    whole: Batchwise,
) -> Comparison:
    """What the losses read of a micro-batch.

    Args:
        logprobs, reference: (S,) summed log-probs of all responses; reference is 0 for a loss that
            has none.
        lengths: (S,) tokens of the responses.
    """
    starts = [0, *accumulate(map(responses_in, items))]
    columns = [
        [start + item.best for start, item in zip(starts, items, strict=False)],
        [start + item.worst for start, item in zip(starts, items, strict=False)],
        [item.is_good for item in items],
    ]
    best, worst, good = tensor_on(logprobs.device, columns)  # (N,) each
    good = good.bool()
    rho = per_response(logprobs - reference, lengths, algo)
    nll = -logprobs[best] * good * whole.nll_scale
    doubt = doubts_of([item.answers for item in items], algo, rho)
    return Comparison(logprobs, rho, best, worst, good, nll, doubt)


def preference_losses(
    batch: Comparison,
    items: list[PreferenceItem],
    algo: DpoAlgo,
    whole: Batchwise,
    weights: tuple[float, float],
) -> Tensor:
    """(N,) the losses of a micro-batch, without the NLL of sft_coef.

    Args:
        weights: kto's lambda_D and lambda_U.
    """
    rho, logprobs, best, worst, h = batch.rho, batch.logprobs, batch.best, batch.worst, batch.h
    beta = reward_scale(algo)
    match algo.loss:
        case "dpo" | "length_normalised":
            losses = preference.dpo_loss(h, beta, batch.doubt)
        case "robust":
            assert algo.label_smoothing is not None
            losses = preference.robust_dpo_loss(h, beta, algo.label_smoothing)
        case "ipo" | "ipo_mean":
            losses = preference.ipo_loss(h, beta, batch.doubt)
        case "hinge":
            losses = preference.hinge_loss(h, beta)
        case "plackett_luce":
            ranks, mask = rankings_of([item.answers for item in items], rho.device)  # (N, K)
            losses = reward_model.plackett_luce_loss(on_grid(mask, beta * rho), ranks, mask)
        case "kto":
            losses = preference.kto_loss(rho, batch.good, whole.z0, beta, *weights)
        case "orpo":
            assert algo.lam is not None
            losses = batch.nll + algo.lam * preference.odds_ratio_loss(rho[best], rho[worst])
        case "simpo":
            assert algo.gamma is not None
            losses = preference.simpo_loss(rho[best], rho[worst], beta, algo.gamma)
        case "unlikelihood":
            assert algo.alpha is not None
            losses = preference.unlikelihood_loss(logprobs[best], logprobs[worst], algo.alpha)
        case "preferred_ft":
            losses = batch.nll
        case _:
            raise ValueError(
                f"conf/algo has an option with loss={algo.loss}, which is no case here"
            )
    return losses


def own_losses(own: OwnLoss, batch: Comparison, reference: Tensor, lengths: Tensor) -> Tensor:
    """(N,) the losses of a micro-batch by a function of the user's, without the NLL of sft_coef.

    Args:
        reference, lengths: (S,) as for `comparison_of`.
    """
    best, worst = batch.best, batch.worst
    return own.losses(
        chosen_logps=batch.logprobs[best],
        rejected_logps=batch.logprobs[worst],
        reference_chosen_logps=reference[best],
        reference_rejected_logps=reference[worst],
        chosen_lengths=lengths[best],
        rejected_lengths=lengths[worst],
    )


# --------------------------------------------------------------------------- metrics


def metrics_of(batch: Comparison, algo: DpoAlgo, whole: Batchwise) -> dict[str, Tensor]:
    """Of each item: (N,) each."""
    beta = reward_scale(algo)
    rewards = (beta * batch.rho).detach()  # (S,)
    if algo.loss == "kto":
        return thumbs_metrics(rewards, batch.logprobs, batch.good, beta * whole.z0)
    chosen, rejected = rewards[batch.best], rewards[batch.worst]
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": judging.accuracy(at_first_equal(chosen), at_first_equal(rejected)),
        "logprobs/chosen": batch.logprobs[batch.best],
        "logprobs/rejected": batch.logprobs[batch.worst],
    }
    if algo.loss in ("dpo", "length_normalised"):
        metrics["gradient_weight"] = preference.dpo_gradient_weight(batch.h, beta, batch.doubt)
    return metrics


def thumbs_metrics(
    rewards: Tensor, logprobs: Tensor, good: Tensor, baseline: float
) -> dict[str, Tensor]:
    """Of single responses, 0 where they are of the other class: (N,) each.

    Args:
        baseline: the reward above which kto calls a response good.
    """
    bar = torch.full_like(rewards, baseline)
    hits = judging.accuracy(at_first_equal(rewards), at_first_equal(bar))
    return {
        "rewards/chosen": rewards * good,
        "rewards/rejected": rewards * ~good,
        "rewards/accuracy": torch.where(good, hits, 1 - hits),
        "logprobs/chosen": logprobs * good,
        "logprobs/rejected": logprobs * ~good,
    }


def at_first_equal(rewards: Tensor) -> Tensor:
    """Rewards without the rounding noise that tells them apart while policy is reference."""
    return rewards.round(decimals=5)


def by_class(means: Metrics, items: list[PreferenceItem]) -> Metrics:
    """kto: means over all items become means over the good and over the bad; others stay."""
    good = sum(item.is_good for item in items)
    if "rewards/margin" in means:
        return means
    for side, count in (("chosen", good), ("rejected", len(items) - good)):
        for name in (f"rewards/{side}", f"logprobs/{side}"):
            total = means.pop(name) * len(items)
            if count:
                means[name] = total / count
    if 0 < good < len(items):
        means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


# --------------------------------------------------------------------------- evaluation


def evaluated(
    objective: DpoObjective,
    held_out: list[PreferenceItem],
    parts: dict[str, list[PreferenceItem]],
    sampled_kl: Callable[[], float | None],
) -> Metrics:
    """The objective on held-out items, and of each source, if there are several; with a reference,
    the KL on sampled responses.
    """
    term = objective.term(held_out, objective.batchwise(held_out))
    means = by_class(term.evaluated(), held_out)
    kl = sampled_kl()
    if kl is not None:
        means["kl"] = kl
    for name, items in parts.items():
        part = objective.term(items, objective.batchwise(items)).evaluated()
        means[f"source/{name}/loss"] = part["loss"]
    return {f"eval/{name}": value for name, value in means.items()}
