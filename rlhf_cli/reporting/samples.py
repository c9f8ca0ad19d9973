"""Sample rollouts, shown as a table and kept in samples.jsonl."""

import math
from collections.abc import Sequence

from torch import Tensor

from rlhf_cli.reporting.console import table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rollout.rollouts import Rollout

SHOWN = 3
WIDTH = 240


def show_samples(
    step: int,
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    kls: Sequence[float],
    file: JsonLines,
) -> None:
    """Show the first few rollouts of a step and append all of its rollouts to samples.jsonl.

    Args:
        scores: of each rollout; None where it has no reward.
    """
    rows = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), score, float(kl))
        for rollout, score, kl in zip(rollouts, scores, kls, strict=True)
    ]
    table(f"step {step}", ("prompt", "response", "reward", "KL"), rows[:SHOWN])
    for rollout, score, kl in zip(rollouts, scores, kls, strict=True):
        values = {
            "prompt": rollout.row.prompt,
            "response": rollout.text,
            "finish": rollout.finish,
            "reward": score,
            "kl": float(kl),
        }
        file.write(step, values)


def known_or_none(scores: Tensor) -> list[float | None]:
    """Scores as JSON and tables have them: None for NaN, which marks a response without one."""
    return [None if math.isnan(score) else score for score in scores.tolist()]


def last_words(prompt: str | list[dict[str, str]]) -> str:
    """What the prompt ends with; of a dialogue its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def clip(text: str) -> str:
    """The end of a long text."""
    return text if len(text) <= WIDTH else "..." + text[-WIDTH:]
