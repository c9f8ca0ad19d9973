"""Sample rollouts, shown as a table and kept in samples.jsonl."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_cli.reporting.console import table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rollout.rollouts import Rollout

SHOWN = 3
WIDTH = 240


def show_samples(
    step: int,
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    parts: Mapping[str, Sequence[float | None]],
    kls: Sequence[float],
    file: JsonLines,
) -> None:
    """Show the first few rollouts of a step and append all of its rollouts to samples.jsonl.

    Args:
        rewards: of each rollout, as it is learnt from; None where it has none.
        parts: the terms that the reward is summed from, by name, where there are several.
    """
    names = [name.rsplit("/", 1)[-1].partition(":")[0] for name in parts]
    rows = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), *figures)
        for rollout, *figures in zip(rollouts, rewards, *parts.values(), kls, strict=True)
    ]
    table(f"step {step}", ("prompt", "response", "reward", *names, "KL"), rows[:SHOWN])
    for i, (rollout, reward, kl) in enumerate(zip(rollouts, rewards, kls, strict=True)):
        values: dict[str, Any] = {
            "prompt": rollout.row.prompt,
            "response": rollout.text,
            "finish": rollout.finish,
            "reward": reward,
            "kl": kl,
        }
        if parts:
            values["parts"] = {name: column[i] for name, column in parts.items()}
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
