"""Multiple choice: what a policy knows, asked without sampling. The tax of alignment shows in it.

A row has a `prompt`, its `choices`, and as `answer` the right one: its text, or its number from 0.
A cloze is the same, with the words that may fill the gap as choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.files import find
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.parse import rows_of_file
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.runs.policy import Policy


@dataclass
class Question:
    """A prompt with K >= 2 responses, of which one is right."""

    row: Prompt
    choices: list[str]
    answer: int


def questions_of(path: str) -> list[Question]:
    """The questions of a file, folder or pattern.

    Raises:
        UserError: a row is none, and which.
    """
    questions = []
    for file in find(path).train:
        for raw, place in rows_of_file(file):
            if isinstance(raw, Exception):
                raise UserError(str(raw))
            questions.append(question_of(raw, place))
    if not questions:
        raise UserError(f"choices={path} has no rows")
    return questions


def question_of(raw: Any, place: str) -> Question:
    """A row as a question."""
    choices, answer = raw.get("choices"), raw.get("answer")
    texts = isinstance(choices, list) and all(isinstance(each, str) and each for each in choices)
    if not isinstance(raw.get("prompt"), str | list) or not texts or len(choices) < 2:
        raise UserError(f"{place}: needs prompt, and choices: a list of two texts or more")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f"{place}: answer must be one of choices, or its number from 0, got {answer!r}"
        )
    rest = {name: raw[name] for name in raw if name not in ("prompt", "choices", "answer")}
    return Question(Prompt(raw["prompt"], rest, place), choices, answer)


def right_answers(questions: Sequence[Question], policy: Policy, cfg: EvaluateConfig) -> Tensor:
    """(N, 1) 1 where the right choice has the highest mean log-prob of its tokens; ties share.

    The mean, not the sum, lest the shortest one win. What ends a response is no part of it.
    """
    rows = [question.row for question in questions for _ in question.choices]
    texts = [choice for question in questions for choice in question.choices]
    tokens = policy.encoder.written(rows, texts, [False] * len(rows))
    means = iter([each.mean() for each in logprobs_of(policy.model, tokens, cfg.hardware)])
    hits = []
    for question in questions:
        scores = torch.stack([next(means) for _ in question.choices])
        best = scores == scores.max()
        hits.append(float(best[question.answer]) / int(best.sum()))
    return torch.tensor(hits, dtype=torch.double)[:, None]


def by_chance(questions: Sequence[Question]) -> float:
    """What guessing gets."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
