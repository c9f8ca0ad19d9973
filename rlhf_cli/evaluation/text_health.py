"""The health of what a policy writes: does it vary, repeat itself, copy, come near the references?

Words are what stands between blanks. BLEU is sacrebleu's and ROUGE is rouge-score's, which are an
optional extra (`text`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec

import torch

from rlhf_cli.data.held_out import hash_of
from rlhf_cli.data.kinds import Demonstration, reply_text
from rlhf_cli.data.rows import Rows
from rlhf_cli.evaluation.figures import Figures, Sampled
from rlhf_cli.objectives.estimates import clustered_mean
from rlhf_cli.rewards.rules import repeated_share

REPEATED_WORDS = 4  # a run of so many that comes again is a repetition
COMPARED = 8  # responses to a prompt, at most, that are compared with each other
COPIED_WORDS = 8  # a run of so many that training rows have is a copy


class Seen:
    """The responses of training rows: their runs of words, and the whole of each, by hash."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.runs: set[int] = set()
        self.whole: set[int] = set()
        for text in texts:
            self.runs.update(map(hash_of, runs_of(text, COPIED_WORDS)))
            self.whole.add(hash_of(" ".join(text.split())))

    @classmethod
    def of(cls, rows: Rows) -> "Seen":
        """What the training side of data has to imitate."""
        train = rows.split(Demonstration).train
        return cls(reply_text(row.completion) for row in train)

    def share(self, text: str) -> float:
        """Of the runs of words of a response those that a training row has; 0 without any run."""
        runs = runs_of(text, COPIED_WORDS)
        return sum(hash_of(run) in self.runs for run in runs) / len(runs) if runs else 0.0

    def holds(self, text: str) -> bool:
        """Whether a training row has exactly this response, but for blanks."""
        return hash_of(" ".join(text.split())) in self.whole


def runs_of(text: str, size: int) -> list[str]:
    """Each run of so many words."""
    words = text.split()
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def text_figures(sampled: Sampled, references: Sequence[str | None], seen: Seen | None) -> Figures:
    """Of the responses of a policy; estimates are {mean, stderr}, clustered by prompt.

    Args:
        references: of each prompt, where the data has one.
        seen: what training rows say; None counts no copies.
    """
    texts = [rollout.text for rollout in sampled.rollouts]
    groups = [
        texts[i : i + sampled.samples] for i in range(0, len(texts), sampled.samples)
    ]  # by prompt
    figures: Figures = {}
    for size in (1, 2):
        figures[f"distinct_{size}"] = distinct(texts, size)
    estimates = {"repetition": [repeated_share(text.split(), REPEATED_WORDS) for text in texts]}
    if seen is not None:
        estimates["copied"] = [seen.share(text) for text in texts]
        estimates["verbatim"] = [float(seen.holds(text)) for text in texts]
    for name, values in estimates.items():
        figures[name] = asdict(clustered_mean(sampled.by_prompt(values)))
    pairs = [
        (group, said) for group, said in zip(groups, references, strict=True) if said is not None
    ]
    if find_spec("sacrebleu") is not None:
        if sampled.samples > 1:
            own = [[self_bleu(group[:COMPARED])] for group in groups]
            figures["self_bleu"] = clustered(own)
        if pairs:
            near = [[bleu(text, [said]) for text in group] for group, said in pairs]
            figures["bleu"] = clustered(near)
    if pairs and find_spec("rouge_score") is not None:
        overlaps = rouge(pairs)
        figures |= {name: clustered(values) for name, values in overlaps.items()}
    return figures


def clustered(values: Sequence[Sequence[float]]) -> Figures:
    """{mean, stderr} of (N, K) values, clustered by prompt."""
    return asdict(clustered_mean(torch.tensor(values, dtype=torch.double)))


def distinct(texts: Sequence[str], size: int) -> float | None:
    """Different runs of words over all runs (Li 2016, 1510.03055); None where there are none.

    It falls as there is more text: compare it at one number of samples.
    """
    runs = [run for text in texts for run in runs_of(text, size)]
    return len(set(runs)) / len(runs) if runs else None


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each response to a prompt against the others (Zhu 2018, 1802.01886), 0 to 1."""
    others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
    return sum(map(bleu, texts, others)) / len(texts)


def bleu(text: str, references: Sequence[str]) -> float:
    """Of a sentence, 0 to 1, with sacrebleu's own smoothing and tokens."""
    import sacrebleu  # optional, and slow to import

    score: float = sacrebleu.sentence_bleu(text, list(references), use_effective_order=True).score
    return score / 100


class Words:
    """Words for ROUGE, of any script; of plain English those of rouge-score itself."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters and digits, in lower case."""
        return re.findall(r"[^\W_]+", text.lower())


def rouge(
    pairs: Sequence[tuple[Sequence[str], str]],
) -> dict[str, list[list[float]]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) as F1, 0 to 1, of responses against the reference.

    Args:
        pairs: for each prompt the responses, and its reference.

    Returns:
        By name (N, K).
    """
    from rouge_score.rouge_scorer import RougeScorer  # optional, and slow to import

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names), tokenizer=Words())
    found = [[scorer.score(said, text) for text in group] for group, said in pairs]
    return {
        ours: [[float(each[theirs].fmeasure) for each in group] for group in found]
        for theirs, ours in names.items()
    }
