"""Reward models from every kind of feedback: a scalar head on the policy's trunk.

    bradley_terry  - log s(r_w - r_l - margin)                    pairs     (2203.02155 eq. 1)
    kwise          - 1/C(K,2) sum over pairs of log s(r_i - r_j)  rankings  (2203.02155 eq. 1)
    plackett_luce  - sum_k [r_(k) - logsumexp_{j >= k} r_(j)]     rankings  (2305.18290 App. A.3)
    pointwise      logistic on a label, or (r - score)^2          responses (2110.14168)
    process        logistic on each step's label, at its end      stepwise  (2305.20050)
    token          bradley_terry on the mean of token rewards     pairs     (2306.00398 eq. 2)

Each response is forwarded once. Its score is read at its last token, the EOS; of steps at the last
token of each; of tokens everywhere. After training, mean and standard deviation of the scores of
demonstrations go into stage.json, and every consumer normalises by them. A reward model in place of
the policy goes on with its head (preference model pretraining, 2112.00861 sec. 4).

    rlhf-cli reward algo=kwise policy=runs/demo/sft data=rows data.path=rankings.jsonl
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.algorithms import RewardAlgo
from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.stages import RewardConfig
from rlhf_cli.data.batches import Batch, doubts_of, rankings_of
from rlhf_cli.data.items import Answers, Tokens, responses_in
from rlhf_cli.data.kinds import Demonstration
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.store import by_source
from rlhf_cli.data.streaming import Stream, first
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.data.transfer import numbers_like, tensor_on
from rlhf_cli.evaluation.judging import (
    Report,
    accuracy,
    figures,
    judge,
    numbers_in,
    with_order_reversed,
    with_prompts_exchanged,
)
from rlhf_cli.evaluation.report import write_judgement
from rlhf_cli.folders.manifest import LEVELS, RESPONSE, STEP
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.forward import on_grid, response_scores, token_scores
from rlhf_cli.models.heads import head_name, told_of_head
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.score import scores_of, token_scores_of
from rlhf_cli.models.scorers import scorer_to_train
from rlhf_cli.objectives import reward_model
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.reporting.grid import with_error
from rlhf_cli.rewards.aggregation import Aggregation
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.encoders import encoder_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.session import Session
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer

IMITATED = 10_000  # demonstrations, at most, by whose scores all are normalised


def run(cfg: RewardConfig, plan: Plan | None = None) -> Path:
    """Train and write the reward model; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    algo, hardware, encoder = cfg.algo, cfg.hardware, encoder_of(cfg, session.rows)
    tokenizer = encoder.tokenizer
    data = session.data.judged(encoder)
    train, held_out = data.train, list(data.held_out)
    parts = by_source(data.held_out, held_out)
    level = LEVELS.get(algo.loss, RESPONSE)
    seed = derived_seed(cfg.seed, "head")
    scorer, notes = scorer_to_train(cfg.policy, cfg.model, tokenizer, seed, session.device, level)
    session.introduce(scorer)
    session.note([*notes, *told_of_head(scorer), *data.notes], data)
    demonstrations = to_imitate(encoder, session, train)
    if hardware.gradient_checkpointing is True:
        recompute_activations(scorer)
    aggregation = Aggregation(level, algo.aggregate, encoder.step_cutter)

    batches = session.data.batches(train, algo.batch_size, algo.epochs, "reward", algo.max_steps)
    optimizer = Optimizer({"reward": (scorer, algo.rate)}, algo, len(batches), hardware)
    best = Best(scorer, *session.resume({"reward": scorer}, optimizer))
    objective = RewardObjective(scorer, aggregation, algo, hardware)
    log = session.log()

    with Bar("reward", len(batches)) as bar:
        for step in session.steps(bar):
            batch = batches[step - 1]
            metrics = optimizer.step([objective.term(batch)]) | session.cost(batch)
            if step % algo.eval_every == 0 or step == len(batches):
                metrics |= evaluated(objective, held_out, parts, algo)
                bar.advance(0, held_out_line(metrics))
                if algo.keep == "best":
                    best.offer(-metrics["eval/objective"])
            log.write(step, metrics)
            session.save(step, {"reward": scorer}, optimizer, best.state(), best.weights)

    best.put()
    session.settle(scorer)
    scorer.eval()
    report = final_report(objective, held_out, parts, algo)
    statistics = statistics_of(aggregation.scores(scorer, demonstrations, hardware).double())
    head = {
        "name": head_name(unwrap(scorer)),
        "loss": algo.loss,
        "target": algo.target,
        "aggregate": algo.aggregate,
        "step_end": cfg.data.step_end if level == STEP else None,
        "centring": algo.centring,
    }
    return session.finish_model(
        scorer,
        "reward",
        encoder,
        figures(report),
        write_beside=partial(write_judgement, report=report, title=f"{cfg.out}, held-out rows"),
        reward=statistics,
        level=level,
        head=head,
    )


class RewardObjective:
    """What the scores of responses, or of their steps, are fitted to."""

    def __init__(
        self, scorer: nn.Module, aggregation: Aggregation, algo: RewardAlgo, hardware: Hardware
    ) -> None:
        self._scorer, self._aggregation = scorer, aggregation
        self._algo, self._hardware = algo, hardware
        self._layout = layout_of(scorer, hardware)

    def term(self, batch: list[Answers]) -> LossTerm:
        """The loss of an optimizer step: a mean over rows, or over the steps of all rows."""
        count = sum(max(len(item.ends), 1) for item in batch)
        return LossTerm.of(batch, self.loss, count, self._hardware, self._layout, logits=False)

    def loss(self, items: list[Answers]) -> Loss:
        """Of a micro-batch, summed over rows or steps."""
        batch = batch_of(self._scorer, items, self._layout)
        losses, metrics = fit(self._scores_in(batch, items), items, self._algo)
        return losses.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def _scores_in(self, batch: Batch, items: list[Answers]) -> Tensor:
        """Scores with gradient of all responses, (S,), or of all their steps, (N,)."""
        if self._aggregation.level == RESPONSE:
            return response_scores(self._scorer, batch)
        grid = token_scores(self._scorer, batch)  # (S, R)
        if self._aggregation.level == STEP:
            width = grid.shape[1]
            ends = [i * width + end for i, item in enumerate(items) for end in item.ends]
            return grid.flatten()[tensor_on(grid.device, ends)]
        sums = (grid * batch.response).sum(-1)
        return sums / batch.response.sum(-1) if self._aggregation.aggregate == "mean" else sums

    def scores(self, items: list[Answers]) -> list[Tensor]:
        """Per row the scores of its responses, or of its steps; without gradient."""
        counts = [responses_in(item) for item in items]
        if self._aggregation.level == RESPONSE:
            scores = scores_of(self._scorer, items, self._hardware)  # (S,)
            return list(scores.split(counts))
        sequences = [sequence for item in items for sequence in item.sequences]
        if self._aggregation.level == STEP:
            per_token = token_scores_of(self._scorer, sequences, self._hardware)
            return [scores[item.ends] for scores, item in zip(per_token, items, strict=True)]
        return list(self._aggregation.scores(self._scorer, sequences, self._hardware).split(counts))


def fit(scores: Tensor, items: list[Answers], algo: RewardAlgo) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, an item each, and metrics of the same shape.

    Args:
        scores: with gradient, of all responses (S,), or of all their steps (N,).
    """
    rows = [item.row for item in items]
    if algo.loss in ("bradley_terry", "token"):
        assert algo.centring is not None
        chosen, rejected = scores.view(-1, 2).unbind(-1)  # (N,) each
        margin = numbers_like(scores, [row.margin for row in rows]) if algo.row_margin else None
        doubt = doubts_of(items, algo, scores)
        losses = reward_model.bradley_terry_loss(chosen, rejected, margin, doubt)
        losses = losses + algo.centring * reward_model.centring_penalty(chosen, rejected)
        return losses, {"accuracy": accuracy(chosen, rejected), "margin": chosen - rejected}
    if algo.loss in ("kwise", "plackett_luce"):
        ranks, mask = rankings_of(items, scores.device)  # (P, K)
        grid = on_grid(mask, scores)
        kwise = algo.loss == "kwise"
        loss = reward_model.kwise_loss if kwise else reward_model.plackett_luce_loss
        hits = reward_model.ranking_accuracy(grid, ranks, mask)
        return loss(grid, ranks, mask), {"accuracy": hits}
    if algo.loss not in ("pointwise", "process"):
        raise ValueError(f"an option of conf/algo has loss={algo.loss}, which is no case here")
    if algo.target == "score":
        targets = numbers_like(scores, [row.score for row in rows])
        return reward_model.regression_loss(scores, targets), {}
    per_item = (
        [row.labels[: len(item.ends)] for row, item in zip(rows, items, strict=True)]
        if algo.loss == "process"
        else [[float(row.label)] for row in rows]
    )
    labels = numbers_like(scores, [label for labels in per_item for label in labels])
    hits = accuracy(scores, torch.zeros_like(scores))  # 1 where the model says right
    right = hits * labels + (1 - hits) * (1 - labels)
    return reward_model.logistic_loss(scores, labels), {"accuracy": right}


# --------------------------------------------------------------------------- items


def to_imitate(
    encoder: Encoder, session: Session, train: Sequence[Answers] | Stream[Answers]
) -> list[Tokens]:
    """The demonstrations by whose scores all are normalised; without two, all responses judged.

    Of many the first ones will do: their mean and deviation are known to a hundredth.
    """
    try:
        shown: list[Tokens] = first(session.data.tokenised(encoder, Demonstration).train, IMITATED)
    except UserError:  # none is good enough to imitate
        shown = []
    if len(shown) >= 2:
        return shown
    say("no two demonstrations: scores are normalised by those of all training responses")
    return [sequence for item in first(train, IMITATED) for sequence in item.sequences]


# --------------------------------------------------------------------------- evaluation


def evaluated(
    objective: RewardObjective,
    held_out: list[Answers],
    parts: dict[str, list[Answers]],
    algo: RewardAlgo,
) -> Metrics:
    """How held-out rows are judged; the loss of each source, if there are several, and of all where
    it chooses the weights.
    """
    metrics = figures(judge(held_out, objective.scores(held_out), algo.target))
    for name, items in parts.items():
        metrics[f"eval/source/{name}/loss"] = objective.term(items).evaluated()["loss"]
    if algo.keep == "best":
        metrics["eval/objective"] = objective.term(held_out).evaluated()["loss"]
    return metrics


def final_report(
    objective: RewardObjective,
    held_out: list[Answers],
    parts: dict[str, list[Answers]],
    algo: RewardAlgo,
) -> Report:
    """How the reward model judges held-out rows, those of each source by themselves, and pairs with
    sides swapped and prompts exchanged too.
    """
    report = judge(held_out, objective.scores(held_out), algo.target)
    if parts:
        report["by_source"] = [
            {"source": name, **numbers_in(judge(items, objective.scores(items), algo.target))}
            for name, items in parts.items()
        ]
    if "pairs" not in report:
        return report
    tell_by_rule(report)
    # Sides in the other order, labels too: 1 - accuracy, unless the scorer hears the order.
    scores = [each.flip(0) for each in objective.scores(with_order_reversed(held_out))]
    report["accuracy_swapped"] = 1 - judge(held_out, scores)["accuracy"]
    if len({tuple(item.prompt) for item in held_out}) > 1:
        # What the responses show without their prompt.
        scores = objective.scores(with_prompts_exchanged(held_out))
        report["accuracy_prompt_exchanged"] = judge(held_out, scores)["accuracy"]
    return report


def tell_by_rule(report: Report) -> None:
    """How right the scores are on labels that were drawn, beside those that a rule has chosen."""
    parts = [
        f"{with_error(each['accuracy'], each['accuracy_stderr'])} of {each['pairs']} pairs "
        f"selected by {each['selected']}"
        for each in report.get("by_selected", ())
    ]
    if parts:
        say(f"held out, its scores are right on {', on '.join(parts)}")


def held_out_line(metrics: Metrics) -> str:
    """The figure to watch."""
    for name in ("accuracy", "kendall_tau", "mse"):
        if f"eval/{name}" in metrics:
            return f"held-out {name} {metrics[f'eval/{name}']:.3f}"
    return ""


def statistics_of(scores: Tensor) -> Metrics:
    """Mean and standard deviation of the scores of demonstrations, (N,).

    Raises:
        RunError: they do not vary, so no reward can be normalised by them.
    """
    statistics = {"mean": scores.mean().item(), "std": scores.std().item()}
    if not (math.isfinite(statistics["std"]) and statistics["std"] > 0):
        raise RunError(
            f"the scores of {len(scores)} demonstrations have a standard deviation of "
            f"{statistics['std']}, by which no reward can be normalised; give more demonstrations"
        )
    say(f"scores of demonstrations: mean {statistics['mean']:.3f}, std {statistics['std']:.3f}")
    return statistics
