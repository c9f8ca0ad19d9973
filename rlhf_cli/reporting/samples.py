"""Sample rollouts, shown as a table and kept in samples.jsonl."""

from collections.abc import Sequence

from rlhf_cli.reporting.console import table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rollout.rollouts import Rollout

SHOWN = 3
WIDTH = 240


def show_samples(
    step: int,
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    kls: Sequence[float],
    file: JsonLines,
) -> None:
    """Show the first few rollouts of a step and append all of its rollouts to samples.jsonl."""
    rows = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), float(score), float(kl))
        for rollout, score, kl in zip(rollouts, scores, kls, strict=True)
    ]
    table(f"step {step}", ("prompt", "response", "reward", "KL"), rows[:SHOWN])
    for rollout, score, kl in zip(rollouts, scores, kls, strict=True):
        values = {
            "prompt": rollout.row.prompt,
            "response": rollout.text,
            "finish": rollout.finish,
            "reward": float(score),
            "kl": float(kl),
        }
        file.write(step, values)


def last_words(prompt: str | list[dict[str, str]]) -> str:
    """What the prompt ends with; of a dialogue its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def clip(text: str) -> str:
    """The end of a long text."""
    return text if len(text) <= WIDTH else "..." + text[-WIDTH:]
