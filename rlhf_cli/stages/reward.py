"""Reward models from every kind of feedback: a scalar head on the policy's trunk.

    bradley_terry  - log s(r_w - r_l - margin)                    pairs     (2203.02155 eq. 1)
    kwise          - 1/C(K,2) sum over pairs of log s(r_i - r_j)  rankings  (2203.02155 eq. 1)
    plackett_luce  - sum_k [r_(k) - logsumexp_{j >= k} r_(j)]     rankings  (2305.18290 App. A.3)
    pointwise      logistic on a label, or (r - score)^2          responses (2110.14168)
    process        logistic on each step's label, at its end      steps     (2305.20050)
    token          bradley_terry on the mean of token rewards     pairs     (2306.00398 eq. 2)

Each response is forwarded once. Its score is read at its last token, the EOS; of steps at the last
token of each; of tokens everywhere. After training, mean and standard deviation of the scores of
demonstrations go into stage.json, and every consumer normalises by them.

    rlhf-cli reward algo=kwise policy=runs/demo/sft data=jsonl data.path=rankings.jsonl
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema import Hardware, RewardAlgo, RewardConfig
from rlhf_cli.data.batches import Batch, cut, rankings_of
from rlhf_cli.data.kinds import Demonstration
from rlhf_cli.data.order import EpochBatches, derived_seed
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Answers, Encoder, Tokens
from rlhf_cli.evaluation.judging import (
    accuracy,
    figures,
    judge,
    with_order_reversed,
    with_prompts_exchanged,
)
from rlhf_cli.evaluation.report import show_judgement, write_judgement
from rlhf_cli.folders.manifest import RESPONSE, STEP, TOKEN
from rlhf_cli.models.forward import (
    answer_batch,
    on_grid,
    response_scores,
    shares_prompts,
    token_scores,
    unwrap,
)
from rlhf_cli.models.heads import head_name
from rlhf_cli.models.load import load_tokenizer, scorer_from_policy
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.models.score import scores_of, token_scores_of
from rlhf_cli.models.shared import recompute_activations
from rlhf_cli.objectives.reward_model import (
    bradley_terry_loss,
    centring_penalty,
    kwise_loss,
    logistic_loss,
    plackett_luce_loss,
    ranking_accuracy,
    regression_loss,
)
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rewards.models import Reading
from rlhf_cli.runs.preflight import check_judgements, row_kind, sizes
from rlhf_cli.runs.session import begin
from rlhf_cli.training.best import Best
from rlhf_cli.training.loss_term import Loss, LossTerm, Metrics
from rlhf_cli.training.optimize import Optimizer


def run(cfg: RewardConfig) -> Path:
    """Train and write the reward model; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    tokenizer = load_tokenizer(cfg.policy, cfg.model)
    encoder = Encoder(tokenizer, cfg.data)
    rows = read_split(cfg.data, row_kind(cfg))
    check_judgements(cfg, rows.train + rows.held_out)
    train, held_out = encoder.answers(rows.train), encoder.answers(rows.held_out)
    level = {"process": STEP, "token": TOKEN}.get(algo.loss, RESPONSE)
    seed = derived_seed(cfg.seed, "head")
    scorer = scorer_from_policy(cfg.policy, cfg.model, tokenizer, seed, session.device, level)
    session.note(encoder, [*rows.notes, sizes(train, held_out)])
    demonstrations = to_imitate(encoder, cfg, train)
    if hardware.gradient_checkpointing:
        recompute_activations(scorer)
    share = hardware.share_prompts and shares_prompts(scorer)
    reading = Reading(level, algo.aggregate, encoder.step_cutter)

    steps = math.ceil(len(train) / algo.batch_size) * algo.epochs
    optimizer = Optimizer({"reward": (scorer, algo.lr)}, algo, steps)
    best = Best(scorer, *session.resume({"reward": scorer}, optimizer))
    log = session.log()

    def loss(items: list[Answers]) -> Loss:
        batch = answer_batch(scorer, items, share)
        losses, metrics = fit(scores_in(scorer, batch, items, reading), items, algo)
        return losses.sum(), {name: value.detach().sum() for name, value in metrics.items()}

    def scores(items: list[Answers]) -> list[Tensor]:
        return scores_of_rows(scorer, items, reading, hardware, share)

    lighter = partial(keys_that_help, hardware, logits=False, gradient=True)
    batches = EpochBatches(train, algo.batch_size, algo.epochs, cfg.seed, "reward")
    with Bar("reward", steps) as bar:
        bar.skip(session.start)
        for step, batch in enumerate(batches, 1):
            if step <= session.start:
                continue
            bar.advance()
            micro_batches = cut(batch, hardware.tokens_per_microbatch, count=responses_in)
            part = LossTerm(micro_batches, loss, judgements_in(batch), 1.0, responses_in, lighter)
            metrics = optimizer.step([part])
            if step % algo.eval_every == 0 or step == steps:
                metrics |= figures(judge(held_out, scores(held_out), algo.target))
                bar.advance(0, held_out_line(metrics))
                if algo.keep == "best":
                    best.offer(-metrics.get("eval/loss", metrics.get("eval/mse", math.inf)))
            log.write(step, metrics)
            session.save(step, {"reward": scorer}, optimizer, best.state(), best.weights)

    best.put()
    scorer.eval()
    final = judge(held_out, scores(held_out), algo.target)
    if "pairs" in final:
        # Sides in the other order, labels too: 1 - accuracy, unless the scorer hears the order.
        reversed_scores = [each.flip(0) for each in scores(with_order_reversed(held_out))]
        final["accuracy_swapped"] = 1 - judge(held_out, reversed_scores)["accuracy"]
        if len({tuple(item.prompt) for item in held_out}) > 1:
            # What the responses show without their prompt.
            strangers = with_prompts_exchanged(held_out)
            final["accuracy_prompt_exchanged"] = judge(held_out, scores(strangers))["accuracy"]
    statistics = statistics_of(reading.scores(scorer, demonstrations, hardware).double())
    show_judgement("held-out rows", final)

    return session.finish_model(
        scorer,
        "reward",
        encoder,
        figures(final),
        write_beside=partial(write_judgement, report=final, title=f"{cfg.out}, held-out rows"),
        reward=statistics,
        level=level,
        head={
            "name": head_name(unwrap(scorer)),
            "loss": algo.loss,
            "aggregate": algo.aggregate,
            "step_end": cfg.data.step_end if level == STEP else None,
            "centring": algo.centring,
        },
    )


def to_imitate(encoder: Encoder, cfg: RewardConfig, train: list[Answers]) -> list[Tokens]:
    """The demonstrations by whose scores all are normalised; without two, all responses judged."""
    try:
        found = encoder.demonstrations(read_split(cfg.data, Demonstration).train)
    except UserError:  # none is good enough to imitate
        found = []
    if len(found) >= 2:
        return found
    say("no two demonstrations: scores are normalised by those of all training responses")
    return [sequence for item in train for sequence in item.sequences]


def responses_in(item: Answers) -> int:
    """Sequences that an item takes in a batch."""
    return len(item.responses)


def judgements_in(items: list[Answers]) -> int:
    """What the loss is a mean over: rows, or the steps of all rows."""
    return sum(max(len(item.ends), 1) for item in items)


def scores_in(scorer: nn.Module, batch: Batch, items: list[Answers], reading: Reading) -> Tensor:
    """Scores with gradient of all responses, (S,), or of all their steps, (N,)."""
    if reading.level == RESPONSE:
        return response_scores(scorer, batch)
    grid = token_scores(scorer, batch)  # (S, R)
    if reading.level == STEP:
        return torch.cat([grid[i, item.ends] for i, item in enumerate(items)])
    sums = (grid * batch.response).sum(-1)
    return sums / batch.response.sum(-1) if reading.aggregate == "mean" else sums


def fit(scores: Tensor, items: list[Answers], algo: RewardAlgo) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a micro-batch, an item each, and metrics of the same shape.

    Args:
        scores: as `scores_in` gives them.
    """
    rows = [item.row for item in items]
    if algo.loss in ("bradley_terry", "token"):
        assert algo.label_smoothing is not None and algo.centring is not None
        chosen, rejected = scores.view(-1, 2).unbind(-1)  # (N,) each
        margin = scores.new_tensor([row.margin for row in rows]) if algo.row_margin else None
        losses = bradley_terry_loss(chosen, rejected, margin, algo.label_smoothing)
        losses = losses + algo.centring * centring_penalty(chosen, rejected)
        return losses, {"accuracy": accuracy(chosen, rejected), "margin": chosen - rejected}
    if algo.loss in ("kwise", "plackett_luce"):
        ranks, mask = rankings_of(items, scores.device)  # (P, K)
        objective = kwise_loss if algo.loss == "kwise" else plackett_luce_loss
        grid = on_grid(mask, scores)
        return objective(grid, ranks, mask), {"accuracy": ranking_accuracy(grid, ranks, mask)}
    if algo.target == "score":
        targets = scores.new_tensor([row.score for row in rows])
        return regression_loss(scores, targets), {}
    per_item = (
        [row.labels[: len(item.ends)] for row, item in zip(rows, items, strict=True)]
        if algo.loss == "process"
        else [[float(row.label)] for row in rows]
    )
    labels = scores.new_tensor([label for labels in per_item for label in labels])
    hits = accuracy(scores, torch.zeros_like(scores))  # 1 where the model says right
    return logistic_loss(scores, labels), {"accuracy": hits * labels + (1 - hits) * (1 - labels)}


def scores_of_rows(
    scorer: nn.Module, items: list[Answers], reading: Reading, hardware: Hardware, share: bool
) -> list[Tensor]:
    """Per row the scores of its responses, or of its steps; without gradient."""
    counts = [responses_in(item) for item in items]
    if reading.level == RESPONSE:
        return list(scores_of(scorer, items, hardware, share=share).split(counts))
    sequences = [sequence for item in items for sequence in item.sequences]
    if reading.level == STEP:
        found = token_scores_of(scorer, sequences, hardware)
        return [scores[item.ends] for scores, item in zip(found, items, strict=True)]
    scores = reading.scores(scorer, sequences, hardware)
    return list(scores.split(counts))


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
