"""Whether a server runs the weights that were trained: its log-probs beside those of our own pass.

A probe is a prompt of the run's own first prompts, with a continuation that the server once gave.
Each time it scores both, which reads no cache, and samples once more after the prompt, which does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TEMPERATURE = 0.5  # of the probe's sample: log-probs before and after it are told apart
LIMIT = 0.2  # mean |difference| in nats between two sound engines; bfloat16 is well below
MOVED = 1e-3  # what scores must have moved by to be compared with those before
CLEARLY = 4  # times what two engines differ by anyway


@dataclass(frozen=True)
class Scores:
    """Log-probs of the tokens of a fixed sequence: as a server gives them, and as we compute them.

    served, own: (N,), at temperature 1.
    """

    served: Tensor
    own: Tensor

    @property
    def gap(self) -> float:
        """The mean |difference| in nats."""
        return float((self.served - self.own).abs().mean())


@dataclass(frozen=True)
class Sample:
    """Log-probs of the tokens that a server drew after the prompt of a probe.

    served: (N,) as it gives them.
    own: (N,) as we compute them at TEMPERATURE.
    plain: (N,) as we compute them at temperature 1.
    """

    served: Tensor
    own: Tensor
    plain: Tensor


def fault_of(scores: Scores, sample: Sample, before: Scores | None) -> str | None:
    """What is wrong with the weights of a server, in words; None where nothing is.

    Scores of two engines differ by rounding. Where ours have moved by clearly more than that since
    the weights before, the server's must have moved with them: along ours by
    <served - before, own - before> / |own - before|^2, which is 1 of the new weights and 0 of the
    old.

    Args:
        before: the scores of the weights before, of the same sequence.
    """
    if not torch.isfinite(scores.served).all() or not torch.isfinite(sample.served).all():
        return "its log-probs are not finite"
    if scores.gap > LIMIT:
        return f"its log-probs differ from those of these weights by {scores.gap:.3g} nats"
    if before is not None:
        ours, theirs = scores.own - before.own, scores.served - before.served
        least = max(MOVED, CLEARLY * _size(before.served - before.own))
        along = float((theirs * ours).sum() / (ours * ours).sum()) if _size(ours) > least else 1.0
        if along < 0.5:
            return (
                f"its log-probs have moved by {along:.0%} of what these weights moved ours, which "
                f"is {_size(ours):.3g} nats: it runs those before"
            )
    gap = float((sample.served - sample.own).abs().mean())
    if gap <= LIMIT:
        return None
    if float((sample.served - sample.plain).abs().mean()) <= LIMIT:
        return (
            "it tells log-probs before temperature: start it with --logprobs-mode "
            "processed_logprobs"
        )
    return (
        f"it scores a text as these weights do, and samples otherwise, by {gap:.3g} nats: what it "
        "keeps of prompts (prefix cache) is of other weights"
    )


def _size(values: Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())
