"""Rows to imitate from critique and revision: constitutional AI (2212.08073 sec. 3.1).

A response is criticised by a principle and rewritten by the critique, as often as asked, each time
by a principle that is drawn anew. What is written is the prompt with the last revision, without
principle and critique; these stand in a file of their own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.stages import GenerateConfig
from rlhf_cli.data.order import derived_seed
from rlhf_cli.evaluation.judge_questions import PRINCIPLE, asked_text, filled_in
from rlhf_cli.evaluation.judgements import name_of
from rlhf_cli.evaluation.picked import DEMONSTRATIONS
from rlhf_cli.evaluation.principles import drawn, read_principles, template_of
from rlhf_cli.evaluation.revisers import Reviser, Said, Written
from rlhf_cli.evaluation.samples import renamed
from rlhf_cli.folders.journal import Journal
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.out_files import CHECKPOINTS

REVISIONS = "revisions.jsonl"
CRITIQUE, REVISION = "critique", "revision"

SHOWN = """Here are a prompt and a response to it.

Prompt:
{prompt}

Response:
{response}

"""
CRITIQUE_REQUEST = f"""{SHOWN}Say in which ways the response goes against this principle: \
{PRINCIPLE}
Critique: """
REVISION_REQUEST = f"""{SHOWN}A critique of the response by the principle "{PRINCIPLE}":
{{critique}}

Write the response anew, so that it follows the principle and answers the prompt, and nothing else.
Revision: """
"""The requests, where critique_prompt and revision_prompt name no others."""


@dataclass(frozen=True)
class Requests:
    """How a reviser is asked, and by which principles."""

    principles: list[str]
    critique: str
    revision: str

    @classmethod
    def of(cls, cfg: GenerateConfig) -> "Requests":
        """Those of a config.

        Raises:
            UserError: a file cannot be read, or lacks a part.
        """
        shown = ("{prompt}", "{response}")
        return cls(
            read_principles(cfg.principles),
            template_of(
                *("critique_prompt", cfg.critique_prompt, CRITIQUE_REQUEST), (*shown, PRINCIPLE)
            ),
            template_of(
                *("revision_prompt", cfg.revision_prompt, REVISION_REQUEST), (*shown, "{critique}")
            ),
        )


@dataclass
class Draft:
    """A response on its way.

    place: among all that the run samples.
    text: as it is now. steps: principle, critique and revision of each time.
    """

    place: int
    rollout: Rollout
    text: str
    steps: list[dict[str, str]] = field(default_factory=list)


def fault_of(revision: Said) -> str | None:
    """Why it is none that a row could have."""
    if not revision.ended:
        return "with a revision that was cut, at algo.max_tokens or by a filter"
    return None if revision.text.strip() else "with an empty revision"


class Revised:
    """The files of what is revised, and how much that is."""

    def __init__(self, cfg: GenerateConfig, reviser: Reviser, out: Path, folder: Path) -> None:
        """With what earlier starts of the run have been told, which is not asked again.

        Args:
            out: of the run, where what was written is kept until the end.
            folder: that files are written into, afresh.
        """
        self._cfg, self._reviser = cfg, reviser
        self._requests = Requests.of(cfg)
        self._demonstrations = JsonLines(folder / DEMONSTRATIONS)
        self._revisions = JsonLines(folder / REVISIONS)
        self._journal = Journal(out / CHECKPOINTS / REVISIONS, lambda: check_lock(out))
        self._known = {asked: Said(*said) for asked, said in by_main(self._read).items()}
        self._counts: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()  # responses without a last revision, by the reason

    def _read(self) -> dict[str, tuple[str, bool]]:
        return {each["asked"]: each["said"] for block in self._journal.blocks() for each in block}

    def add(self, rollouts: Sequence[Rollout], samples: int, first: int) -> None:
        """Revise some more responses, of which each prompt has so many, side by side.

        Args:
            first: the place of the first of them among all that the run samples.
        """
        drafts = [
            Draft(first + i, rollout, rollout.text)
            for i, rollout in enumerate(rollouts)
            if rollout.text.strip()
        ]
        self._counts["asked"] += len(rollouts)
        self._lost["empty"] += len(rollouts) - len(drafts)
        for time in range(self._cfg.algo.revisions):
            drafts = self._once_more(drafts, time)
        by_main(lambda: self._write(drafts, samples))

    def _once_more(self, drafts: Sequence[Draft], time: int) -> list[Draft]:
        """Criticise and revise each; those that come to nothing are left out."""
        seed = self._cfg.seed
        principles = {
            draft.place: drawn(self._requests.principles, seed, "revision", draft.place, time)
            for draft in drafts
        }
        parts = {
            draft.place: {
                "{prompt}": asked_text(draft.rollout.row.prompt),
                "{response}": draft.text,
                PRINCIPLE: principles[draft.place],
            }
            for draft in drafts
        }
        critiques = self._asked(CRITIQUE, self._requests.critique, parts, time)
        for place, critique in critiques.items():
            parts[place]["{critique}"] = critique.text.strip()
        self._lost["without a critique"] += len(parts) - len(critiques)
        parts = {place: parts[place] for place in critiques}
        revisions = self._asked(REVISION, self._requests.revision, parts, time)
        self._lost["without a revision"] += len(parts) - len(revisions)
        left = []
        for draft in drafts:
            revision = revisions.get(draft.place)
            if revision is None:
                continue
            if fault := fault_of(revision):
                self._lost[fault] += 1
                continue
            draft.text = revision.text.strip()
            draft.steps.append(
                {
                    "principle": principles[draft.place],
                    "critique": parts[draft.place]["{critique}"],
                    "revision": draft.text,
                }
            )
            left.append(draft)
        return left

    def _asked(
        self, what: str, template: str, parts: Mapping[int, dict[str, str]], time: int
    ) -> Written:
        """What the reviser writes about drafts, by their places."""
        places = list(parts)
        requests = [filled_in(template, parts[place]) for place in places]
        names = [
            name_of(f"{what} {time} {place}\n{request}")
            for place, request in zip(places, requests, strict=True)
        ]
        done = {i: self._known[name] for i, name in enumerate(names) if name in self._known}

        def keep(made: Mapping[int, Said]) -> None:
            self._journal.append([{"asked": names[i], "said": said} for i, said in made.items()])

        with Bar(what, len(requests)) as bar:
            bar.skip(len(done))
            seed = derived_seed(self._cfg.seed, what, time, places[0] if places else 0)
            written = self._reviser.write(requests, done, keep, seed, bar)
        return {places[i]: said for i, said in written.items()}

    def _write(self, drafts: Sequence[Draft], samples: int) -> None:
        told: set[tuple[int, str]] = set()
        for draft in drafts:
            row, prompt = draft.rollout.row, draft.place // samples
            first = {"prompt": row.prompt, "response": draft.rollout.text}
            about = {"sample": draft.place % samples, "revisions": draft.steps}
            self._revisions.append({**first, **about}, None)
            self._counts["changed"] += draft.text != draft.rollout.text.strip()
            if (prompt, draft.text) in told:  # a text counts once to a prompt
                continue
            told.add((prompt, draft.text))
            columns = renamed(row.columns, {})
            said = {"prompt": row.prompt, "completion": draft.text}
            self._demonstrations.append({**columns, **said}, None)
            self._counts["demonstrations"] += 1
        self._counts["revised"] += len(drafts)

    def metrics(self) -> dict[str, float]:
        """How many rows there are, and how many responses came to nothing.

        Raises:
            RunError: all of them did.
        """
        counts: dict[str, int] = by_main(lambda: dict(self._counts))
        why = ", ".join(f"{count} {reason}" for reason, count in self._lost.items() if count)
        if not counts.get("revised"):
            raise RunError(f"none of {counts['asked']} responses has a revision: {why}")
        if lost := counts["asked"] - counts["revised"]:
            say(f"{lost} of {counts['asked']} responses are left out: {why}")
        return {
            "demonstrations": counts["demonstrations"],
            "revised": counts["revised"] / counts["asked"],
            "revisions_changed": counts.get("changed", 0) / counts["revised"],
        }
