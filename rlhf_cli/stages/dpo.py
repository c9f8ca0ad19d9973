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

plus sft_coef times the NLL per token of chosen responses. The reference is the policy as it starts,
another folder, or the policy after SFT on the chosen side (reference=bootstrap). Where policy and
reference start as one, every rho is 0 at first; the stage stops where it is not.

    rlhf-cli dpo policy=runs/demo/sft data=hh data.path=hh.jsonl algo.beta=0.1
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema import DpoAlgo, DpoConfig
from rlhf_cli.config.stages import WITHOUT_REFERENCE
from rlhf_cli.data.batches import cut, rankings_of
from rlhf_cli.data.kinds import Feedback, Prompt, Ranking
from rlhf_cli.data.order import EpochBatches, derived_seed, order_of
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Answers, Tokens
from rlhf_cli.evaluation.judging import accuracy, figures, judge
from rlhf_cli.evaluation.report import show_judgement, write_judgement
from rlhf_cli.models.forward import (
    answer_batch,
    matmul_in_float32,
    on_grid,
    shares_prompts,
    token_logprobs,
)
from rlhf_cli.models.out_of_memory import in_groups, keys_that_help, oom_error
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.objectives.kl import k1
from rlhf_cli.objectives.preference import (
    dpo_gradient_weight,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    kto_weights,
    odds_ratio_loss,
    robust_dpo_loss,
    simpo_loss,
    unlikelihood_loss,
)
from rlhf_cli.objectives.reward_model import plackett_luce_loss
from rlhf_cli.preferences.reference import (
    BOOTSTRAP,
    Compared,
    bootstrap,
    fill_reference,
    known_references,
    reference_of,
    reference_origin,
    seen_from,
    sequence_logprobs,
)
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.rollouts import sample_rollouts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.policy import Policy, check_reference, policy_of
from rlhf_cli.runs.preflight import check_judgements, row_kind, sizes
from rlhf_cli.runs.session import Session, begin
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer

KL_PROMPTS = 64  # held-out prompts whose sampled responses estimate the KL
PER_TOKEN = ("length_normalised", "ipo_mean", "orpo", "simpo")  # losses of means over tokens

Sums = dict[str, Tensor]


@dataclass
class Item(Compared):
    """The responses that a row judges, and what the loss compares them with.

    mismatched: kto: the row's prompt with the response of another row, for the baseline z0.
    """

    mismatched: Compared | None = None

    @property
    def best(self) -> int:
        """Place of the best response; kto: of the only one."""
        row = self.answers.row
        return row.ranks.index(min(row.ranks)) if isinstance(row, Ranking) else 0

    @property
    def worst(self) -> int:
        """Place of the worst response, the last of several."""
        row = self.answers.row
        if isinstance(row, Ranking):
            return max(range(len(row.ranks)), key=lambda i: (row.ranks[i], i))
        return len(self.answers.responses) - 1

    @property
    def is_good(self) -> bool:
        """Whether `best` is a response to imitate: kto's bad ones are not."""
        row = self.answers.row
        return not isinstance(row, Feedback) or bool(row.label)


@dataclass
class Batchwise:
    """What one item's loss needs to know of all items of its optimizer step.

    z0: kto's baseline in nats.
    nll_scale: items per token of a good response; sums of NLL times it have the mean per token.
    """

    z0: float
    nll_scale: float


def run(cfg: DpoConfig) -> Path:
    """Train and write the policy; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    policy = policy_of(session, cfg.policy)
    rows = read_split(cfg.data, row_kind(cfg))
    check_judgements(cfg, rows.train + rows.held_out)
    train = items_of(policy.encoder.answers(rows.train), cfg, "training")
    held_out = items_of(policy.encoder.answers(rows.held_out), cfg, "held-out")
    weights = class_weights(train, algo)
    session.note(policy.encoder, [*rows.notes, sizes(train, held_out)])
    share = hardware.share_prompts and shares_prompts(policy.model)

    if cfg.reference == BOOTSTRAP:
        bootstrap(session, policy, good_sequences(train))
    compares = algo.loss not in WITHOUT_REFERENCE
    origin = reference_origin(session, cfg) if compares or cfg.reference == BOOTSTRAP else {}
    reference = reference_of(session, policy, cfg) if compares else None
    if reference is not None:
        share = share and shares_prompts(reference.model)  # perhaps of another architecture
        # Later epochs batch rows otherwise, which changes the rounding: a resumed run would differ.
        ahead = algo.precompute_reference or algo.epochs > 1
        for side in (compared(held_out), compared(train) if ahead else []):
            with Bar("reference log-probs", len(side)) as bar:
                fill_reference(reference, side, cfg, share, origin, bar.advance)
        if algo.precompute_reference and not reference.switched_off:
            reference = None  # its memory is free again; eval/kl needs it and is left out

    steps = math.ceil(len(train) / algo.batch_size) * algo.epochs
    optimizer = Optimizer({"policy": (policy.model, algo.lr)}, algo, steps)
    best = Best(policy.model, *session.resume({"policy": policy.model}, optimizer))
    log = session.log()

    def loss(items: list[Item], whole: Batchwise) -> Loss:
        answers = [item.answers for item in items]
        batch = answer_batch(policy.model, answers, share)
        scored = token_logprobs(policy.model, batch, chunk=hardware.logprob_chunk)
        logprobs, lengths = scored.logprobs.sum(-1), batch.response.sum(-1)  # (S,)
        known = [item.reference for item in items if item.reference is not None]
        ref = torch.cat(known).to(logprobs) if known else torch.zeros_like(logprobs)
        losses, metrics = objective(logprobs, ref, lengths, items, algo, whole, weights)
        return losses.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def batchwise(items: list[Item]) -> Batchwise:
        """Over all items of a step, so that no cut into micro-batches changes the loss."""
        tokens = sum(len(sequence.response) for sequence in good_sequences(items))
        scale = len(items) / tokens if tokens else 0.0
        mismatched = [item.mismatched for item in items if item.mismatched is not None]
        if not mismatched:
            return Batchwise(0.0, scale)
        ours = torch.cat(sequence_logprobs(policy.model, mismatched, cfg.hardware, share))
        return Batchwise(kto_baseline(ours - known_references(mismatched)).item(), scale)

    def micro_batches(items: list[Item]) -> list[list[Item]]:
        return cut(items, hardware.tokens_per_microbatch, count=responses_in)

    def too_large(group: list[Item]) -> RunError:
        keys = keys_that_help(hardware, len(group[0]), logits=True)
        return oom_error("the evaluation", responses_in(group[0]), len(group[0]), keys)

    def evaluate() -> Metrics:
        whole, sums = batchwise(held_out), Metrics()
        with torch.no_grad():
            each = in_groups(micro_batches(held_out), partial(loss, whole=whole), too_large)
            for _, (total, metrics) in each:
                for name, value in {"loss": total, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
        means = by_class({name: sums[name] / len(held_out) for name in sums}, held_out)
        if reference is not None:
            prompts = [Prompt(row.prompt, {}, row.source) for row in rows.held_out[:KL_PROMPTS]]
            means["kl"] = sampled_kl(policy, reference, prompts, cfg)
        return {f"eval/{name}": value for name, value in means.items()}

    if session.start == 0 and compares and cfg.reference in (None, BOOTSTRAP):
        ours = torch.cat(sequence_logprobs(policy.model, held_out, hardware, share))
        gap = (ours - known_references(held_out)).abs().max().item()
        check_start(session, policy, evaluate(), gap, algo)
    lighter = partial(keys_that_help, hardware, logits=True, gradient=True)
    batches = EpochBatches(train, algo.batch_size, algo.epochs, cfg.seed, "dpo")
    with Bar("dpo", steps) as bar:
        bar.skip(session.start)
        for step, batch in enumerate(batches, 1):
            if step <= session.start:
                continue
            bar.advance()
            began = time.monotonic()
            if reference is not None:
                fill_reference(reference, compared(batch), cfg, share)
            whole = batchwise(batch)
            of_batch = partial(loss, whole=whole)
            part = LossTerm(micro_batches(batch), of_batch, len(batch), 1.0, responses_in, lighter)
            metrics = by_class(optimizer.step([part]), batch)
            if algo.loss == "kto":
                metrics["z0"] = whole.z0
            metrics["tokens_per_second"] = tokens_in(batch) / (time.monotonic() - began)
            if step % algo.eval_every == 0 or step == steps:
                metrics |= evaluate()
                accuracy = metrics["eval/rewards/accuracy"]
                line = f"held-out loss {metrics['eval/loss']:.3f}  accuracy {accuracy:.3f}"
                bar.advance(0, line)
                if algo.keep == "best":
                    best.offer(-metrics["eval/loss"])
            log.write(step, metrics)
            session.save(step, {"policy": policy.model}, optimizer, best.state(), best.weights)
    best.put()

    logprobs = sequence_logprobs(policy.model, held_out, hardware, share)
    rewards = implicit_rewards(logprobs, held_out, algo)
    report = judge([item.answers for item in held_out], rewards)
    show_judgement("implicit rewards of held-out rows", report)
    final = {**figures(report), **evaluate()}  # eval/loss is the objective's
    if reference is not None:
        check_reference(session, reference)
    return session.finish_model(
        policy.model,
        "policy",
        policy.encoder,
        final,
        write_beside=partial(write_judgement, report=report, title=f"{cfg.out}, held-out rows"),
        **provenance(rewards, held_out, algo, origin, session.out),
    )


# --------------------------------------------------------------------------- the objective


def objective(
    logprobs: Tensor,
    reference: Tensor,
    lengths: Tensor,
    items: list[Item],
    algo: DpoAlgo,
    whole: Batchwise,
    weights: tuple[float, float],
) -> tuple[Tensor, Sums]:
    """The losses of a micro-batch, (N,) for N items, and metrics of the same shape.

    Args:
        logprobs, reference: (S,) summed log-probs of all responses, item by item; reference is 0
            for a loss that has none.
        lengths: (S,) tokens of the responses.
        whole: of the optimizer step.
        weights: kto's lambda_D and lambda_U.
    """
    rho = logprobs - reference
    if algo.loss in PER_TOKEN:
        rho = rho / lengths
    starts = [0, *accumulate(map(responses_in, items))]
    best = [start + item.best for start, item in zip(starts, items, strict=False)]
    worst = [start + item.worst for start, item in zip(starts, items, strict=False)]
    good = torch.tensor([item.is_good for item in items], device=rho.device)
    nll = -logprobs[best] * good * whole.nll_scale  # (N,); its mean is the NLL per token
    h = rho[best] - rho[worst]
    beta = reward_scale(algo)
    rewards = (beta * rho).detach()  # (S,)
    smoothing = algo.label_smoothing or 0.0
    match algo.loss:
        case "dpo" | "length_normalised":
            losses = dpo_loss(h, beta, smoothing)
        case "robust":
            losses = robust_dpo_loss(h, beta, smoothing)
        case "ipo" | "ipo_mean":
            losses = ipo_loss(h, beta)
        case "hinge":
            losses = hinge_loss(h, beta)
        case "plackett_luce":
            ranks, mask = rankings_of([item.answers for item in items], rho.device)  # (N, K)
            losses = plackett_luce_loss(on_grid(mask, beta * rho), ranks, mask)
        case "kto":
            losses = kto_loss(rho, good, whole.z0, beta, *weights)
        case "orpo":
            assert algo.lam is not None
            losses = nll + algo.lam * odds_ratio_loss(rho[best], rho[worst])
        case "simpo":
            assert algo.gamma is not None
            losses = simpo_loss(rho[best], rho[worst], beta, algo.gamma)
        case "unlikelihood":
            assert algo.alpha is not None
            losses = unlikelihood_loss(logprobs[best], logprobs[worst], algo.alpha)
        case _:  # preferred_ft
            losses = nll
    if algo.sft_coef:
        losses = losses + algo.sft_coef * nll
    if algo.loss == "kto":
        hits = accuracy(at_first_equal(rewards), torch.full_like(rewards, beta * whole.z0))
        hits = torch.where(good, hits, 1 - hits)
        return losses, {
            "rewards/chosen": rewards * good,
            "rewards/rejected": rewards * ~good,
            "rewards/accuracy": hits,
            "logprobs/chosen": logprobs * good,
            "logprobs/rejected": logprobs * ~good,
        }
    chosen, rejected = rewards[best], rewards[worst]
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": chosen - rejected,
        "rewards/accuracy": accuracy(at_first_equal(chosen), at_first_equal(rejected)),
        "logprobs/chosen": logprobs[best],
        "logprobs/rejected": logprobs[worst],
    }
    if algo.loss in ("dpo", "length_normalised"):
        metrics["gradient_weight"] = dpo_gradient_weight(h, beta)
    return losses, metrics


def at_first_equal(rewards: Tensor) -> Tensor:
    """Rewards without the rounding noise that tells them apart while policy is reference."""
    return rewards.round(decimals=5)


def reward_scale(algo: DpoAlgo) -> float:
    """beta of the implicit reward beta rho; IPO calls it tau, and some losses have none."""
    return algo.beta or algo.tau or 1.0


def by_class(means: Metrics, items: list[Item]) -> Metrics:
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


def class_weights(items: list[Item], algo: DpoAlgo) -> tuple[float, float]:
    """kto's lambda_D and lambda_U: those given, or else what balances the classes.

    Raises:
        UserError: all rows have one label.
    """
    if algo.loss != "kto":
        return 1.0, 1.0
    if algo.desirable_weight is not None and algo.undesirable_weight is not None:
        return algo.desirable_weight, algo.undesirable_weight
    good = sum(item.is_good for item in items)
    if good in (0, len(items)):
        raise UserError(
            f"all {len(items)} rows are labelled {str(bool(good)).lower()}; kto needs both labels, "
            "or algo.desirable_weight and algo.undesirable_weight"
        )
    return kto_weights(good, len(items) - good)


# --------------------------------------------------------------------------- items


def items_of(answers: list[Answers], cfg: DpoConfig, side: str) -> list[Item]:
    """An item per row; kto's with a partner: the response of the next row in a shuffled order.

    The paper pairs within a batch. A partner that stays lets the reference score it once, and z0
    has the same expectation.

    Raises:
        UserError: all rows have one prompt, so there is no response to another one.
    """
    if cfg.algo.loss != "kto":
        return [Item(each) for each in answers]
    count = len(answers)
    order = order_of(count, cfg.seed, "kto partners", 0)
    items: list[Item] = [Item(each) for each in answers]
    for place, i in enumerate(order):
        after = (answers[order[(place + step) % count]] for step in range(1, count))
        partner = next((other for other in after if other.prompt != answers[i].prompt), None)
        if partner is None:
            raise UserError(
                f"all {side} rows have one prompt; kto compares with responses to other prompts"
            )
        row = answers[i].row
        items[i].mismatched = Compared(Answers(answers[i].prompt, partner.responses, row))
    return items


def responses_in(item: Item) -> int:
    """Sequences that an item takes in a batch."""
    return len(item.answers.responses)


def compared(items: list[Item]) -> list[Compared]:
    """Items and, for kto, their partners: all that the reference scores."""
    return [*items, *(item.mismatched for item in items if item.mismatched is not None)]


def good_sequences(items: list[Item]) -> list[Tokens]:
    """What SFT on the chosen side imitates."""
    return [item.answers.sequences[item.best] for item in items if item.is_good]


def tokens_in(items: list[Item]) -> int:
    """Tokens of all sequences that a step trains on, prompts included once per response."""
    return sum(len(sequence) for item in items for sequence in item.answers.sequences)


# --------------------------------------------------------------------------- figures


def sampled_kl(policy: Policy, reference: Reference, rows: list[Prompt], cfg: DpoConfig) -> float:
    """KL(policy || reference) per response in nats, on responses to a few held-out prompts."""
    prompts = list(zip(*policy.encoder.prompts(rows), strict=True))
    rollouts = sample_rollouts(
        policy.model,
        policy.encoder,
        prompts,
        Sampling(cfg.data.max_response_tokens),
        samples=1,
        seed=derived_seed(cfg.seed, "kl"),
        stop_ids=policy.stop_ids,
        hardware=cfg.hardware,
    )
    sequences = [rollout.tokens for rollout in rollouts]
    ours = logprobs_of(policy.model, sequences, cfg.hardware)
    with reference.active() as model:
        theirs = logprobs_of(model, sequences, cfg.hardware)
    return k1(torch.cat(ours), torch.cat(theirs)).sum().item() / len(rollouts)


def implicit_rewards(logprobs: list[Tensor], items: list[Item], algo: DpoAlgo) -> list[Tensor]:
    """Per item the (K,) beta rho of its responses; of log-probs alone where there is no reference.

    Args:
        logprobs: per item (K,) under the policy.
    """
    rewards = []
    for item, ours in zip(items, logprobs, strict=True):
        rho = ours if item.reference is None else ours - item.reference
        if algo.loss in PER_TOKEN:
            rho = rho / torch.tensor([len(response) for response in item.answers.responses])
        rewards.append(reward_scale(algo) * rho)
    return rewards


def provenance(
    rewards: list[Tensor], items: list[Item], algo: DpoAlgo, origin: dict[str, str], out: Path
) -> dict[str, Any]:
    """For stage.json: the reference, and what makes the policy a reward model.

    Mean and standard deviation, as of a reward model, are those of good held-out responses.
    """
    if not origin:
        return {}
    if algo.loss in WITHOUT_REFERENCE:
        return {"reference": origin}
    pairs = zip(rewards, items, strict=True)
    good = torch.tensor([each[item.best].item() for each, item in pairs if item.is_good]).double()
    implicit = {
        "beta": reward_scale(algo),
        "per_token": algo.loss in PER_TOKEN,
        "reference": seen_from(out, origin),
        "hash": origin["hash"],
    }
    found: dict[str, Any] = {"reference": origin, "implicit_reward": implicit}
    if len(good) > 1 and good.std() > 0:
        found["reward"] = {"mean": good.mean().item(), "std": good.std().item()}
    return found


def check_start(
    session: Session, policy: Policy, before: Metrics, gap: float, algo: DpoAlgo
) -> None:
    """Where policy and reference start as one, all log-ratios are 0; then DPO's loss is ln 2."""
    diagnosis = (
        "policy and reference are not the same model: an adapter was not loaded, dropout is on, "
        "or their numerics differ"
    )
    exact = matmul_in_float32(policy.model)
    session.require("max_abs_log_ratio_at_start", gap, gap < (0.01 if exact else 1.0), diagnosis)
    if algo.loss == "dpo" and not algo.sft_coef:
        tolerance = 1e-3 if exact else 0.05
        loss, margin = before["eval/loss"], before["eval/rewards/margin"]
        session.require("dpo_loss_at_start", loss, abs(loss - math.log(2)) < tolerance, diagnosis)
        session.require("dpo_margin_at_start", margin, abs(margin) < tolerance, diagnosis)
