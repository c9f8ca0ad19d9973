"""What an unfinished generate or evaluate has made: it goes on from there, prompt by prompt.

Responses are kept as they are sampled, with all that is needed to go on as if they had just been;
what judges say of them, by blocks of prompts. Both lie where resume points do, and go with them.
Of responses only the places of their lines are held, so that memory is that of a block of prompts.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from rlhf_cli.config.errors import Interrupted, UserError
from rlhf_cli.data.items import EncodedPrompt, Tokens
from rlhf_cli.evaluation.samples import generated_row
from rlhf_cli.folders.journal import Journal, Placed, Record
from rlhf_cli.folders.json_forms import COUNT, REAL, Form, misfit
from rlhf_cli.folders.manifest import content_hash, file_hash
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.ranks.world import world
from rlhf_cli.rewards.reward import Reward, Scores
from rlhf_cli.rewards.specs import files_of, models_of
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_files import CHECKPOINTS, KEPT, KEPT_SCORES, SAMPLES
from rlhf_cli.runs.session import Session

KEPT_SAMPLES = "what was sampled is kept"
SCORED_AT_ONCE = 256  # prompts whose responses a judge gets in one call

_RESPONSE: Form = {
    "response": str,
    "finish_reason": str,
    "kept": {"policy": str, "place": COUNT, "ids": [COUNT], "logprobs": [REAL]},
}
_SCORES: Form = {
    "policy": str,
    "judge": str,
    "first": COUNT,
    "total": list,
    "parts": {"*": list},
    "seconds": {"*": REAL},
    "steps?": [list],
}


class KeptSamples:
    """The responses and scores of a run, on disk; `out` is the run's own from here on.

    Of several ranks all read what was kept before, and the first keeps what is made.
    """

    def __init__(self, session: Session) -> None:
        session.claim()
        interrupts.wait_for_steps()
        out = session.out

        def guard() -> None:
            check_lock(out)

        self.out = out
        self.responses, self.scores = Journal(out / KEPT, guard), Journal(out / KEPT_SCORES, guard)
        self._lines: dict[tuple[str, int], list[int]] = {}  # policy, place -> where lines begin
        for block in self.responses.placed_blocks():
            if not _fault([record for _, record in block], _RESPONSE):
                self._lines |= _by_prompt(block)
        self._said = [block for block in self.scores.blocks() if not _fault(block, _SCORES)]
        world().barrier("all ranks have read what is kept")
        if world().is_main:
            with suppress(OSError):  # it is to be seen as it grows, and is replaced at the end
                (out / SAMPLES).symlink_to(f"{CHECKPOINTS}/{SAMPLES}")

    def of(
        self, policy: str, prompts: Sequence[EncodedPrompt], samples: int, first: int = 0
    ) -> "SamplesOfPolicy":
        """What one policy responds to prompts.

        Args:
            first: the place of the first of them among all that the run answers.

        Raises:
            UserError: what is kept answers other prompts.
        """
        done = {}
        for place, prompt in enumerate(prompts):
            records = list(self.responses.at(self._lines.get((policy, first + place), [])))
            if records and records[0].get("prompt") != prompt[0].prompt:
                raise UserError(
                    f"out={self.out} was begun with other prompts than these; set overwrite=true "
                    "to start afresh"
                )
            if len(records) == samples:
                done[place] = [_rollout(*prompt, record) for record in records]
        said = {
            (record["judge"], record["first"]): record
            for block in self._said
            for record in block
            if record["policy"] == policy
        }
        return SamplesOfPolicy(self, policy, samples, first, done, said)


class SamplesOfPolicy:
    """The responses of one policy to some prompts in a row, and what judges say of them."""

    def __init__(
        self,
        kept: KeptSamples,
        policy: str,
        samples: int,
        first: int,
        done: dict[int, list[Rollout]],
        said: dict[tuple[str, int], Record],
    ) -> None:
        """Of one policy, with what is kept of it already.

        Args:
            first: the place of the first prompt among all that the run answers.
            done: all responses to prompts, by place among these.
            said: what a judge says of a block of responses, by the place of the first one among
                all.
        """
        self._kept, self._policy, self._samples, self._first = kept, policy, samples, first
        self.done: Mapping[int, list[Rollout]] = done
        self._said = said

    def keep(self, made: Mapping[int, list[Rollout]]) -> None:
        """Write all responses to some more prompts down.

        Raises:
            Interrupted: a signal asked for the end.
        """
        block = [
            {
                **generated_row(rollout, number),
                "kept": {
                    "policy": self._policy,
                    "place": self._first + place,
                    "ids": rollout.tokens.response,
                    "logprobs": rollout.logprobs,
                },
            }
            for place, rollouts in made.items()
            for number, rollout in enumerate(rollouts)
        ]
        if block:
            by_main(lambda: self._kept.responses.append(block))
        stop_if_asked(KEPT_SAMPLES)

    def scored(
        self, name: str, judge: Reward, rollouts: Sequence[Rollout], by_step: bool = False
    ) -> Scores:
        """What a judge says of all responses, and by step of their steps, block by block.

        Raises:
            Interrupted: a signal asked for the end.
        """
        judge_id = f"{name} {identity_of(judge)}"
        size = SCORED_AT_ONCE * self._samples
        parts = []
        for first in range(0, len(rollouts), size):
            block = rollouts[first : first + size]
            place = self._first * self._samples + first
            record = self._said.get((judge_id, place))
            whole = record is not None and len(record["total"]) == len(block)
            if record is not None and whole and ("steps" in record) == by_step:
                parts.append(_scores(record))
                continue
            scores = judge.score(block, by_step)
            record = {
                "policy": self._policy,
                "judge": judge_id,
                "first": place,
                "total": scores.total.tolist(),
                "parts": {spec: part.tolist() for spec, part in scores.parts.items()},
                "seconds": scores.seconds,
            }
            if scores.steps is not None:
                record["steps"] = [each.tolist() for each in scores.steps]
            if not scores.total.isnan().all():  # else it is asked again: a service may be back
                by_main(lambda record=record: self._kept.scores.append([record]))  # type: ignore[misc]
            parts.append(scores)
            stop_if_asked(KEPT_SAMPLES)
        return _joined(parts)


def stop_if_asked(kept: str) -> None:
    """End a run that would go on from what it has kept.

    Args:
        kept: says that it has.

    Raises:
        Interrupted: a signal asked for the end.
    """
    if (name := interrupts.asked()) is not None:
        raise Interrupted(f"{name}: {kept}; the same command goes on")


def identity_of(judge: Reward) -> str:
    """What a judge is made of, by hash: of gold nothing else says whether it has changed."""
    specs = [term.source.spec for term in judge.terms]
    weights = [term.weight for term in judge.terms]
    models = [content_hash(path) for spec in specs for path in models_of(spec)]
    files = sorted({file for spec in specs for file in files_of(spec)})
    return f"{list(zip(weights, specs, strict=True))} {models} {file_hash(*files)}"


def _fault(block: list[Record], form: Form) -> bool:
    """Whether a block is none that a run has written, whatever its checksums say."""
    return any(misfit(record, form) is not None for record in block)


def _by_prompt(block: list[Placed]) -> dict[tuple[str, int], list[int]]:
    """Where the lines of all responses to a prompt of a policy begin."""
    lines: dict[tuple[str, int], list[int]] = {}
    for start, record in block:
        kept = record["kept"]
        lines.setdefault((kept["policy"], kept["place"]), []).append(start)
    return lines


def _rollout(row: Any, prompt: list[int], record: Record) -> Rollout:
    kept = record["kept"]
    tokens = Tokens(prompt, kept["ids"], row.source)
    return Rollout(row, tokens, kept["logprobs"], record["finish_reason"], record["response"])


def _scores(record: Record) -> Scores:
    parts = {spec: torch.tensor(values) for spec, values in record["parts"].items()}
    steps = [torch.tensor(each) for each in record["steps"]] if "steps" in record else None
    return Scores(torch.tensor(record["total"]), parts, record["seconds"], steps)


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of blocks as those of all."""
    specs, by_step = parts[0].parts, parts[0].steps is not None
    return Scores(
        torch.cat([each.total for each in parts]),
        {spec: torch.cat([each.parts[spec] for each in parts]) for spec in specs},
        {spec: sum(each.seconds[spec] for each in parts) for spec in specs},
        [steps for each in parts for steps in each.steps or []] if by_step else None,
    )
