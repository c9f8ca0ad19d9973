"""What is to be labelled: a prompt with responses whose writers nobody is told, and who gets it."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.data.asked import asked_in, not_asked
from rlhf_cli.data.kinds import Turns, reply_text
from rlhf_cli.data.order import order_of
from rlhf_cli.data.responses import responses_of
from rlhf_cli.folders.files import write_text
from rlhf_cli.folders.json_forms import REAL, Form, misfit
from rlhf_cli.reporting.console import say
from rlhf_cli.runs.out_files import TASKS

if TYPE_CHECKING:
    from torch import Tensor

RANK, PAIR, THUMBS = "rank", "pair", "thumbs"
INSTRUCTGPT, STEPS = "instructgpt", "steps"
RANKED = (RANK, INSTRUCTGPT)
"""Protocols that order as many responses as algo.responses says."""
SINGLE = (THUMBS, STEPS)
"""Protocols that judge a response by itself."""
FEWEST = {RANK: 2, PAIR: 2, THUMBS: 1, INSTRUCTGPT: 2, STEPS: 1}
"""Responses that a task of each protocol cannot do without."""

RANDOM = "random"
Select = dict[str, Any]
"""Why a task is labelled: rule, the score that it gave, and the probability with which it was to be
chosen, of a rule 1 given the pool."""

_SAID = ("prompt", "response", "policy", "reward", "response_tokens", "logprob", "finish_reason")
_ROW = {
    "task": str,
    "prompt": (str, list),
    "responses": [str],
    "origins": [{"writers?": [str]}],
    "source": str,
}
_SELECT = {"rule": str, "score": (REAL, None), "probability": REAL}
_MORE = {"select": _SELECT, "steps": [str], "known": dict, "earlier": [dict]}  # where it has them


@dataclass(frozen=True)
class Sample:
    """A response to a prompt.

    source: the row that asked for it.
    origin: who wrote it, and what is known of how: policy, finish_reason, tokens, logprob, reward;
        of what several policies wrote word for word that of the first, and all of them as writers.
    columns: what else its row says, for rules.
    raw, state: where a reward model's head is to learn most, its score, and (d,) what it reads.
    """

    prompt: str | Turns
    text: str
    source: str
    origin: dict[str, Any]
    columns: dict[str, Any] = field(default_factory=dict)
    raw: float = math.nan
    state: "Tensor | None" = None


@dataclass(frozen=True)
class Task:
    """A prompt with K responses, each with its origin.

    id: a hash of prompt and responses.
    select: None of a task that was drawn before there were rules to choose by.
    steps: of the one response of protocol=steps: joined by data.step_join they are it again.
    known: the answer that is right, where it is known, as answers.Answer has it.
    earlier: of an anchor, what earlier runs said of it: their `out` and their answers, the oldest
        first.
    """

    id: str
    prompt: str | Turns
    responses: list[str]
    origins: list[dict[str, Any]]
    source: str
    select: Select | None = None
    steps: list[str] = field(default_factory=list)
    known: dict[str, Any] | None = None
    earlier: list[dict[str, Any]] | None = None

    @property
    def selected(self) -> str:
        """The rule by which it is labelled."""
        return RANDOM if self.select is None else str(self.select["rule"])

    @property
    def planted(self) -> bool:
        """Whether it tells how people judge: everybody gets it, and no row is made of it."""
        return self.known is not None or self.earlier is not None

    @property
    def rewards(self) -> list[float] | None:
        """What a reward says of the responses; None where it does not say it of all."""
        known = [origin.get("reward") for origin in self.origins]
        return None if None in known else [float(each) for each in known if each is not None]

    @property
    def step_rewards(self) -> list[float] | None:
        """What a reward says of the steps; None where it does not say it of each of these."""
        known = self.origins[0].get("step_rewards") or []
        return known if len(known) == len(self.steps) and None not in known else None


@dataclass(frozen=True)
class Turn:
    """A task as an annotator gets it.

    showing: 0, and 1 where it comes once more.
    order: the places of the responses in the task, as they are shown.
    """

    task: Task
    showing: int
    order: list[int]


def spoken(task: Task) -> list[tuple[str, str]]:
    """Who says what in the prompt of a task; nobody is named where it is plain text."""
    if isinstance(task.prompt, str):
        return [("", task.prompt)]
    return [(str(message.get("role")), reply_text(message)) for message in task.prompt]


def key_of(prompt: str | Turns) -> str:
    """A text that two prompts share if they are the same."""
    return json.dumps(prompt, sort_keys=True, default=str)


def writers_of(origin: Mapping[str, Any]) -> list[str]:
    """The policies that wrote a response, word for word."""
    return origin.get("writers") or [str(origin.get("policy"))]


def also_by(sample: Sample, other: Sample) -> Sample:
    """A sample that knows who else wrote its text."""
    writers = list(dict.fromkeys([*writers_of(sample.origin), *writers_of(other.origin)]))
    if len(writers) == 1:
        return sample
    return replace(sample, origin={**sample.origin, "writers": writers})


def distinct(samples: Iterable[Sample]) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """The different responses to each prompt that say something, and how many others there are."""
    prompts: dict[str, dict[str, Sample]] = {}
    dropped = {"empty": 0, "identical": 0}
    for sample in samples:
        said = prompts.setdefault(key_of(sample.prompt), {})
        if not sample.text.strip():
            dropped["empty"] += 1
        elif sample.text in said:
            dropped["identical"] += 1
            said[sample.text] = also_by(said[sample.text], sample)
        else:
            said[sample.text] = sample
    return {key: list(said.values()) for key, said in prompts.items()}, dropped


def task_of(samples: Sequence[Sample], select: Select | None = None) -> Task:
    """A task of the responses to one prompt."""
    first, texts = samples[0], [sample.text for sample in samples]
    origins = [sample.origin for sample in samples]
    return Task(id_of(first.prompt, texts), first.prompt, texts, origins, first.source, select)


def id_of(prompt: str | Turns, texts: Sequence[str]) -> str:
    """What names a task: 64 bits of a hash of prompt and responses."""
    said = json.dumps([key_of(prompt), list(texts)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- on disk


def write_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Tasks as a file that is whole or not there."""
    rows = ({"task": row.pop("id"), **row} for row in map(asdict, tasks))
    said = ({name: row[name] for name in row if name in _ROW or row[name]} for row in rows)
    write_text(folder / TASKS, "".join(json.dumps(row) + "\n" for row in said))


def read_tasks(folder: Path) -> list[Task]:
    """The tasks that `write_tasks` has written.

    Raises:
        UserError: a line is none of them.
    """
    file, tasks = folder / TASKS, []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        fault = "it is no object" if not isinstance(row, dict) else _fault(row)
        if fault is not None:
            raise UserError(f"{file}:{number}: damaged: {fault}; label anew in another out")
        said = row["task"], row["prompt"], row["responses"], row["origins"], row["source"]
        tasks.append(Task(*said, **{name: row[name] for name in _MORE if row.get(name)}))
    return tasks


def _fault(row: dict[str, Any]) -> str | None:
    """What a line of tasks.jsonl lacks."""
    form: Form = {name: each for name, each in _ROW.items() if name != "prompt"}
    form |= {name: each for name, each in _MORE.items() if row.get(name)}
    if (fault := misfit(row, form)) is not None:
        return fault
    if not isinstance(row.get("prompt"), str | list):
        return "prompt is no text and no list of messages"
    return None if len(row["origins"]) == len(row["responses"]) else "responses without origins"


def new_samples(cfg: LabelConfig) -> list[Sample]:
    """The responses that samples=FILE has to prompts that were not asked before.

    Raises:
        UserError: there are none, or a row is none of a response.
    """
    assert cfg.samples is not None
    return not_asked(samples_of_file(cfg.samples), asked_before(cfg))


def asked_before(cfg: LabelConfig) -> set[str]:
    """The identities of the prompts in the files of `asked`, whose number is said."""
    known = asked_in(cfg.asked)
    if known:
        say(f"{len(known)} prompts of {', '.join(cfg.asked)} are not asked again")
    return known


def samples_of_file(path: str) -> list[Sample]:
    """The responses that samples=FILE has.

    Raises:
        UserError: a row lacks prompt or response, or its prompt is no dialogue.
    """
    samples = []
    for raw, policy, prompt, text, place in responses_of(path):
        origin: dict[str, Any] = {"policy": policy}
        reward = raw.get("reward")
        if isinstance(reward, int | float):
            origin |= {"reward": float(reward)}
        known = {"tokens": raw.get("response_tokens"), "logprob": raw.get("logprob")}
        known |= {"finish_reason": raw.get("finish_reason")}
        origin |= {name: value for name, value in known.items() if value is not None}
        columns = {name: value for name, value in raw.items() if name not in _SAID}
        samples.append(Sample(prompt, text, place, origin, columns))
    return samples


# --------------------------------------------------------------------------- who gets what


def dealt(
    tasks: Sequence[Task], annotators: Sequence[str], overlap: float, repeat: float, seed: int
) -> dict[str, list[Turn]]:
    """The turns of each annotator, in an order of their own, by the seed alone.

    A share `overlap` of the tasks goes to all, the others to one each; a share `repeat` of what one
    has comes once more at the end. Both are tasks that no rule has chosen, as far as there are any:
    those alone tell how far people agree. Planted tasks are mixed in, of all for everybody, once.
    How responses are ordered is drawn for each turn.
    """

    def by_a_rule(place: int) -> bool:
        return tasks[place].selected != RANDOM

    plain = [i for i, task in enumerate(tasks) if not task.planted]
    order = sorted((plain[i] for i in order_of(len(plain), seed, "deal", 0)), key=by_a_rule)
    planted = [i for i, task in enumerate(tasks) if task.planted]
    shared = round(overlap * len(plain))
    turns = {}
    for number, who in enumerate(annotators):
        own = order[:shared] + order[shared + number :: len(annotators)]
        count = round(repeat * len(own))
        own += planted
        own = [own[i] for i in order_of(len(own), seed, f"order of {who}", 0)]
        again = sorted((i for i in own if not tasks[i].planted), key=by_a_rule)[:count]
        turns[who] = [
            Turn(tasks[i], showing, shown_order(tasks[i], who, showing, seed))
            for showing, places in enumerate((own, again))
            for i in places
        ]
    return turns


def shown_order(task: Task, who: str, showing: int, seed: int) -> list[int]:
    """How the responses of a task are ordered before somebody's eyes."""
    return order_of(len(task.responses), seed, f"{who} sees {task.id}", showing)
