"""Reward model from comparisons: a scalar head on the policy's trunk.

    L = - mean log sigmoid(r(x, y_w) - r(x, y_l))     (InstructGPT 2203.02155 eq. 1, K = 2)

The score is read at the last token, the EOS. After training, mean and standard deviation of the
scores of demonstrations go into stage.json, and every consumer normalises by them.

    rlhf-cli reward policy=runs/demo/sft data=hh data.path=hh.jsonl
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema import Hardware, Reward
from rlhf_cli.data.batches import collate, cut, derived_seed, epochs_of
from rlhf_cli.data.kinds import Demonstration, Preference
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Encoder, TokenPair
from rlhf_cli.models.forward import sequence_scores, unwrap
from rlhf_cli.models.load import load_tokenizer, scorer_from_policy
from rlhf_cli.models.score import scores_of
from rlhf_cli.objectives.estimates import clustered_stderr
from rlhf_cli.objectives.preference import bradley_terry_loss
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.training.optimize import Loss, Metrics, Optimizer, Part
from rlhf_cli.training.session import begin


def run(cfg: Reward) -> Path:
    """Train and write the reward model; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    algo, hardware = cfg.algo, cfg.hardware
    tokenizer = load_tokenizer(cfg.policy, cfg.model)
    encoder = Encoder(tokenizer, cfg.data)
    rows = read_split(cfg.data, Preference)
    train, held_out = encoder.preferences(rows.train), encoder.preferences(rows.held_out)
    seed = derived_seed(cfg.seed, "head")
    scorer = scorer_from_policy(cfg.policy, cfg.model, tokenizer, seed, session.device)
    session.note(encoder, rows.notes)
    if hardware.gradient_checkpointing:
        unwrap(scorer).gradient_checkpointing_enable()
        scorer.train()  # transformers recomputes in training mode only; all dropout is off

    steps = math.ceil(len(train) / algo.batch_size) * algo.epochs
    optimizer = Optimizer({"reward": (scorer, algo.lr)}, algo, steps)
    session.resume({"reward": scorer}, optimizer)
    log = session.log()

    def loss(pairs: list[TokenPair]) -> Loss:
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        chosen, rejected = sequence_scores(scorer, collate(sides, session.device)).chunk(2)
        metrics = {"accuracy": accuracy(chosen, rejected), "margin": chosen - rejected}
        total = bradley_terry_loss(chosen, rejected).sum()
        return total, {name: value.detach().sum() for name, value in metrics.items()}

    batches = epochs_of(train, algo.batch_size, algo.epochs, cfg.seed, "reward")
    with Bar("reward", steps) as bar:
        for step, batch in enumerate(batches, 1):
            bar.advance()
            if step <= session.start:
                continue
            part = Part(cut(batch, hardware.tokens_per_microbatch), loss, len(batch))
            metrics = optimizer.step([part])
            if step % algo.eval_every == 0 or step == steps:
                metrics |= evaluate(scorer, held_out, hardware)
                bar.advance(0, f"held-out accuracy {metrics['eval/accuracy']:.3f}")
            log.write(step, metrics)
            session.save(step, {"reward": scorer}, optimizer, {})

    scorer.eval()
    final = evaluate(scorer, held_out, hardware)
    demonstrations = encoder.demonstrations(read_split(cfg.data, Demonstration).train)
    scores = scores_of(scorer, demonstrations, hardware).double()
    statistics = {"mean": scores.mean().item(), "std": scores.std().item()}
    if not (math.isfinite(statistics["std"]) and statistics["std"] > 0):
        raise RunError(
            f"the scores of {len(demonstrations)} demonstrations have a standard deviation of "
            f"{statistics['std']}, by which no reward can be normalised; give more demonstrations"
        )
    say(
        f"held-out accuracy {final['eval/accuracy']:.3f} ± {final['eval/accuracy_stderr']:.3f}; "
        f"scores of demonstrations: mean {statistics['mean']:.3f}, std {statistics['std']:.3f}"
    )
    return session.finish_model(scorer, "reward", encoder, final, reward=statistics)


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen side scores higher, one half at a tie: (N,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


@torch.no_grad()
def evaluate(scorer: nn.Module, pairs: list[TokenPair], hardware: Hardware) -> Metrics:
    """Loss and accuracy on held-out pairs, with a standard error clustered by prompt."""
    chosen = scores_of(scorer, [pair.chosen for pair in pairs], hardware)
    rejected = scores_of(scorer, [pair.rejected for pair in pairs], hardware)
    hits = accuracy(chosen, rejected)
    right = hits.mean().item()
    stderr = clustered_stderr(hits, [tuple(pair.chosen.prompt) for pair in pairs])
    return {
        "eval/loss": bradley_terry_loss(chosen, rejected).mean().item(),
        "eval/accuracy": right,
        "eval/accuracy_stderr": stderr,
        "eval/pairs": float(len(pairs)),
    }
