"""Sample rollouts, shown as a table and kept in samples.jsonl."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_cli.data.kinds import reply_text
from rlhf_cli.data.rows import DEMO_FOLDER
from rlhf_cli.reporting.console import board, table
from rlhf_cli.reporting.metrics import TOKEN_VALUES, TOKENS, JsonLines, round_figures
from rlhf_cli.rewards.reward import Scores
from rlhf_cli.rollout.rollouts import Rollout

SHOWN = 3
TERMS = 3  # of a reward, in the table; the file has them all
WIDTH = 240


def show_samples(
    step: int,
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    parts: Mapping[str, Sequence[float | None]],
    kls: Sequence[float] | None,
    tokens: Sequence[Mapping[str, object]],
    file: JsonLines,
) -> None:
    """Append the rollouts of a step to samples.jsonl, and show the first few where no live view
    shows what is appended.

    Args:
        rewards: of each rollout, as it is learnt from; None where it has none.
        parts: the terms that the reward is summed from, by name, where there are several.
        kls: of each rollout to the reference, if they were measured.
        tokens: of each rollout, what `TokenLines` makes of its tokens.
    """
    shown = dict(list(parts.items())[:TERMS])
    measured = {} if kls is None else {"KL": kls}
    figures = list(zip(rewards, *shown.values(), *measured.values(), strict=True))
    first = {id(rollout.row): i for i, rollout in reversed(list(enumerate(rollouts)))}
    rows = [
        (
            clip(last_words(rollouts[i].row.prompt)),
            clip(rollouts[i].text),
            *map(rounded, figures[i]),
        )
        for i in sorted(first.values())[:SHOWN]  # of different prompts
    ]
    names = ("prompt", "response", "reward", *map(short_name, shown), *measured)
    if not board.shows_samples():
        table(f"step {step}", names, rows)
    for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        more = {} if kls is None else {"kl": kls[i]}
        file.write(step, sample_row(rollout, reward, parts_at(parts, i), **more, **tokens[i]))


def sample_row(
    rollout: Rollout, reward: float | None, parts: Mapping[str, float | None], **more: object
) -> dict[str, object]:
    """A line of samples.jsonl, in any stage.

    Args:
        reward: None where the response has none.
        parts: the terms that the reward is summed from, by name, where there are several.
    """
    return {
        "prompt": rollout.row.prompt,
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "reward": reward,
        **more,
        **({"parts": parts} if parts else {}),
    }


OURS = (
    *("policy", "temperature"),
    *("id", "prompt", "sample", "response", "finish_reason", "reward", "parts"),
    *("prompt_tokens", "response_tokens", "logprob", TOKENS, *TOKEN_VALUES),
    *("kept", "part", "crc"),  # of the journal of an unfinished run
)
"""The names that lines of ours have; a column of a row that is called so becomes row_NAME."""
JUDGED = ("gold", "kl", "scores")
"""Further ones of evaluate's lines."""


def generated_row(
    rollout: Rollout,
    sample: int,
    reward: float | None = None,
    parts: Mapping[str, float | None] | None = None,
    tokens: Mapping[str, object] | None = None,
    more: Sequence[str] = (),
) -> dict[str, object]:
    """A line of generate's samples.jsonl: which row was answered, how, and all that the row says.

    Args:
        sample: the number of the response among those to its prompt, from 0.
        tokens: what `TokenLines` makes of its tokens, and its KL.
        more: names that the line leaves free, beside OURS.
    """
    columns = rollout.row.columns
    said = columns.get("id")
    sizes = {
        "prompt_tokens": len(rollout.tokens.prompt),
        "response_tokens": len(rollout.tokens.response),
        "logprob": sum(rollout.logprobs),
        **(tokens or {}),
    }
    ours = {"sample": sample, **sample_row(rollout, reward, parts or {}, **sizes)}
    own = {name: value for name, value in columns.items() if name != "id" or value is None}
    place = rollout.row.source.removeprefix(f"{DEMO_FOLDER}/")  # wherever that is installed
    return {
        "id": place if said is None else said,
        **round_figures(ours),
        **round_figures(renamed(own, rollout.row.beside, (*OURS, *more)), digits=None),
    }


def renamed(
    columns: Mapping[str, object], beside: Mapping[str, object], ours: Sequence[str] = OURS
) -> dict[str, object]:
    """What a row says, under names that a line of `ours` leaves free.

    What it says `beside` its prompt of other responses is never taken for said of ours: its names
    change, too.
    """
    named = {name: value for name, value in columns.items() if name not in ours}
    taken = {name: value for name, value in columns.items() if name in ours}
    for name, value in [*taken.items(), *beside.items()]:
        name = f"row_{name}"
        while name in named:
            name = f"row_{name}"
        named[name] = value
    return named


def term_columns(scores: Scores) -> dict[str, list[float | None]]:
    """The value of each term of a reward by its name, of each rollout; none of a single term."""
    if len(scores.parts) == 1:
        return {}
    return {spec: known_or_none(part) for spec, part in scores.parts.items()}


def parts_at(parts: Mapping[str, Sequence[float | None]], place: int) -> dict[str, float | None]:
    """The terms of the reward of one rollout."""
    return {name: column[place] for name, column in parts.items()}


def short_name(term: str) -> str:
    """A term of a reward in few letters: a function's own name, a rule's, a folder's last part."""
    if ".py:" in term:
        return term.rpartition(":")[2]
    return term.partition(":")[0].rpartition("/")[2]


def rounded(value: float | None) -> float | None:
    """To three decimals, and never -0."""
    return None if value is None else round(value, 3) + 0.0


def known_or_none(scores: Tensor) -> list[float | None]:
    """Scores as JSON and tables have them: None for NaN, which marks a response without one."""
    return [None if math.isnan(score) else score for score in scores.tolist()]


def last_words(prompt: str | list[dict[str, str]]) -> str:
    """What the prompt ends with; of a dialogue its last message."""
    return prompt if isinstance(prompt, str) else reply_text(prompt[-1])


def clip(text: str, width: int = WIDTH) -> str:
    """The end of a long text."""
    return text if len(text) <= width else "..." + text[-width:]
