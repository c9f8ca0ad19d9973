"""Labels that nobody types: by a reward, with errors where they are wanted, and from a file."""

import random
from collections import Counter
from pathlib import Path

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.parse import rows_of_file
from rlhf_cli.labelling.answers import FIELDS, FLAG, SKIP, Answer, dense, fault_of
from rlhf_cli.labelling.desk import Desk
from rlhf_cli.labelling.tasks import PAIR, STEPS, THUMBS, Task
from rlhf_cli.runs.out_files import TASKS


def label_by_reward(desk: Desk, flip: float, seed: int) -> None:
    """Answer all turns that are left by the rewards of their responses.

    Ranks are those of the rewards, equal ones tie; thumbs are up where a reward is above 0. With
    chance `flip` an answer is turned round whole, so that each pair in it is; a task that comes
    once more may be answered otherwise.
    """
    while (turn := desk.current) is not None:
        place = derived_seed(seed, "flip", desk.who, turn.task.id, turn.showing)
        errs = random.Random(place).random() < flip
        answer = by_rewards(turn.task, desk.terms.protocol, errs)
        unknown = {"kind": SKIP, "reason": "the reward does not know all of it"}
        desk.answer(turn, unknown if answer is None else answer)


def by_rewards(task: Task, protocol: str, errs: bool = False) -> Answer | None:
    """The answer that the rewards of a task are, or what is contrary to it; None where it has none.

    A response, and a step, is good where its reward is above 0. Of instructgpt it is the ranks.
    """
    if protocol == STEPS:
        if (steps := task.step_rewards) is None:
            return None
        wrong = (number for number, reward in enumerate(steps, 1) if not reward > 0)
        return {"kind": STEPS, "first_wrong": next(wrong, None)}
    if (rewards := task.rewards) is None:
        return None
    if protocol == THUMBS:
        return {"kind": THUMBS, "label": (rewards[0] > 0) != errs}
    ranks = dense([-reward for reward in rewards] if errs else rewards)
    if protocol == PAIR:
        strength = 0 if ranks == [1, 1] else 1
        return {"kind": PAIR, "ranks": ranks, "strength": strength, "both_bad": False}
    return {"kind": protocol, "ranks": ranks}


def label_by_file(desks: dict[str, Desk], labels: str, folder: Path) -> None:
    """Answer what a file has answers to: rows of task, annotator and what `answers.Answer` has.

    A row that says otherwise than it did takes the place of what was kept of it. The kind may be
    left out where the rest tells it; the annotator where there is but one.

    Raises:
        RunError: there is no such file yet.
        UserError: a row is no answer to a task that its annotator has.
    """
    file = Path(labels)
    fields = FIELDS[next(iter(desks.values())).terms.protocol]
    if not file.is_file():
        raise RunError(
            f"labels={labels} is not there yet; {folder / TASKS} has the tasks: write a row of "
            f"task, annotator and {', '.join(fields)}, skip or flag for each, and give the same "
            "command"
        )
    turns = {
        (who, turn.task.id, turn.showing): turn
        for who, desk in desks.items()
        for turn in desk.turns
    }
    kept = {
        (who, turn.task.id, turn.showing): event
        for who, desk in desks.items()
        for turn, event in desk.own
    }
    times: Counter[tuple[str, str]] = Counter()
    for row, place in rows_of_file(file):
        if isinstance(row, UserError):
            raise row
        who = row.get("annotator", next(iter(desks)) if len(desks) == 1 else None)
        if not isinstance(who, str) or who not in desks:
            raise UserError(f"{place}: annotator is {who!r}; annotators={list(desks)}")
        named = (who, str(row.get("task")))
        turn = turns.get((*named, times[named]))
        times[named] += 1
        if turn is None:
            raise UserError(f"{place}: {who} has no task {row.get('task')!r}, or has it less often")
        desk = desks[who]
        answer, note = answer_of(row, desk.terms.protocol), str(row.get("note") or "")
        before = kept.get((who, turn.task.id, turn.showing), {})
        if {**before, **answer} == before and before.get("note", "") == note:
            continue
        if (fault := fault_of(answer, desk.terms.protocol, turn.task)) is not None:
            raise UserError(f"{place}: {fault}")
        desk.answer(turn, answer, note)


def answer_of(row: dict[str, object], protocol: str) -> Answer:
    """What a row of a file answers, as an event has it; whether it is sound is not asked."""
    for kind in (SKIP, FLAG):
        if row.get(kind) or row.get("kind") == kind:
            reason = row.get("reason", row.get(kind))
            return {"kind": kind, "reason": reason if isinstance(reason, str) else ""}
    decided = {"strength": int(row.get("ranks") != [1, 1]), "both_bad": False}
    said = {name: row[name] for name in FIELDS[protocol] if name in row}
    return {"kind": protocol, **(decided if protocol == PAIR else {}), **said}
