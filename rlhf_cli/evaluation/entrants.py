"""Who is judged: the policy, its baselines, one with demonstrations, the best of n, or a file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.kinds import SAID, Prompt
from rlhf_cli.data.responses import responses_of
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.few_shot import Shots
from rlhf_cli.evaluation.samples import JUDGED, OURS
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.provenance import baselines_of


@dataclass(frozen=True)
class Entrant:
    """A policy under a name of its own.

    path: its folder or hub id.
    shots: what it is shown before each prompt.
    best_of: how many responses each one is the best of, by the reward; 1 chooses nothing.
    """

    name: str
    path: str
    shots: Shots | None = None
    best_of: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether its responses are those that its weights have the log-probs of."""
        return self.shots is None and self.best_of == 1


def entrants_of(cfg: EvaluateConfig, rows: Rows) -> list[Entrant]:
    """The policy, then its baselines, given or beside it, then the one that is shown something, and
    the one whose responses are the best of several.
    """
    paths = dict.fromkeys(str(Path(path)) for path in [cfg.policy, *baselines_of(cfg)])
    entrants = [Entrant(path, path) for path in paths]
    if cfg.prompted is not None:
        assert cfg.few_shot is not None  # validate() asks for it
        path, shots = str(Path(cfg.prompted)), Shots.of(cfg.few_shot, rows)
        entrants.append(Entrant(f"{path} {len(shots.rows)}-shot", path, shots))
    if cfg.best_of is not None:
        path, n = str(Path(cfg.best_of)), cfg.best_of_n
        assert n is not None  # validate() asks for it
        entrants.append(Entrant(f"{path} best of {n}", path, best_of=n))
    return entrants


# --------------------------------------------------------------------------- samples of a file


@dataclass
class Given:
    """What a file says that policies responded: K texts each to the same N prompts.

    responses: by policy, for each prompt the texts, each with whether it came to an end.
    temperature: at which they were sampled; None where policies differ, or the file does not say.
    """

    prompts: list[Prompt]
    responses: dict[str, list[list[tuple[str, bool]]]]
    temperature: float | None

    @property
    def samples(self) -> int:
        """Responses of the first policy to each prompt."""
        return len(next(iter(self.responses.values()))[0])

    def rollouts(self, policy: str, encoder: Encoder) -> list[Rollout]:
        """The responses of a policy, prompt by prompt."""
        said = self.responses[policy]
        rows = [row for row, each in zip(self.prompts, said, strict=True) for _ in each]
        texts = [text for each in said for text, _ in each]
        ended = [end for each in said for _, end in each]
        return [
            Rollout(row, tokens, [], "eos" if end else "length", text)
            for row, tokens, text, end in zip(
                rows, encoder.written(rows, texts, ended), texts, ended, strict=True
            )
        ]


def given_samples(path: str) -> Given:
    """The lines of a samples.jsonl, or of any rows with `prompt` and `response`.

    `policy` names who wrote it; without it that is the file. Of several temperatures the first is
    read. A prompt that not every policy has answered is left out.

    Raises:
        UserError: a row lacks either, its prompt is no dialogue, or a policy has more responses to
            one prompt than to others.
    """
    rows: dict[str, Prompt] = {}
    said: dict[str, dict[str, list[tuple[str, bool]]]] = {}
    at: dict[str, Any] = {}
    for raw, policy, prompt, text, place in responses_of(path):
        if at.setdefault(policy, raw.get("temperature")) != raw.get("temperature"):
            continue
        key = json.dumps(prompt, sort_keys=True)
        rows.setdefault(key, _prompt_of({**raw, "prompt": prompt}, place))
        ended = raw.get("finish_reason") != "length"
        said.setdefault(policy, {}).setdefault(key, []).append((text, ended))
    keys = [key for key in rows if all(key in each for each in said.values())]
    if not keys:
        raise UserError(f"samples={path}: no prompt was answered by all of {', '.join(said)}")
    for policy, each in said.items():
        _check_even(path, policy, [len(each[key]) for key in keys])
    return Given(
        [rows[key] for key in keys],
        {policy: [each[key] for key in keys] for policy, each in said.items()},
        _alike(at.values()),
    )


def _alike(temperatures: Iterable[Any]) -> float | None:
    """What all are, if it is a number."""
    found = {repr(each): each for each in temperatures}
    (one, *others) = found.values()
    return one if not others and isinstance(one, int | float) else None


def _check_even(path: str, policy: str, counts: Sequence[int]) -> None:
    if len(set(counts)) > 1:
        raise UserError(
            f"samples={path}: {policy} has {min(counts)} to {max(counts)} responses to a prompt; "
            "give the same number to each"
        )


def _prompt_of(raw: dict[str, Any], place: str) -> Prompt:
    """A line's prompt, with the columns that rules read, and what its row said of responses."""
    columns = {name: value for name, value in raw.items() if name not in (*OURS, *JUDGED)}
    beside = {name: columns.pop(f"row_{name}") for name in SAID if f"row_{name}" in columns}
    return Prompt(raw["prompt"], columns, place, beside)
