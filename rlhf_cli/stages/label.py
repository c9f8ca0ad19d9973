"""Labelling: what people, a judge, a reward or a file say of the responses of policies, as rows.

InstructGPT's second step (2203.02155): K responses to a prompt, of one policy or several, are
ranked with ties, compared in pairs with how much better one is, get thumbs up or down, are rated
and marked before they are ranked, or have their first wrong step named. Whoever labels is not told
who wrote what, and sees responses in an order of their own.

First responses are sampled, once, into tasks.jsonl; or samples=FILE has them. Then labels are
collected, each on disk before the next task is shown, in events-NAME.jsonl. Once all tasks are
labelled the folder is sealed with rows that reward and dpo read as they are, and with a report:
agreement, Krippendorff's alpha, ratings of the policies. Torch is needed to sample, to score and at
the end; else not.

    rlhf-cli label policy=runs/demo/sft baselines=[runs/demo/ppo] algo.protocol=pair
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.config.selection_rules import only_drawn
from rlhf_cli.data.conversions import steps_of
from rlhf_cli.data.order import derived_seed
from rlhf_cli.folders.files import remove
from rlhf_cli.folders.manifest import MANIFEST
from rlhf_cli.labelling import terminal
from rlhf_cli.labelling.automatic import label_by_file, label_by_reward
from rlhf_cli.labelling.desk import Desk, desks_of, instructions_of
from rlhf_cli.labelling.draws import at_random, pool_of, tasks_in
from rlhf_cli.labelling.majority import MAJORITY, by_majority
from rlhf_cli.labelling.planted import anchor_tasks, known_tasks, with_planted
from rlhf_cli.labelling.rows import counted, rows_of
from rlhf_cli.labelling.tasks import (
    RANDOM,
    STEPS,
    Sample,
    Task,
    new_samples,
    read_tasks,
    write_tasks,
)
from rlhf_cli.reporting.console import say, table
from rlhf_cli.reporting.metrics import round_figures
from rlhf_cli.runs import interrupts
from rlhf_cli.runs.begun import begun_with
from rlhf_cli.runs.lock import check_lock, lock, unlock
from rlhf_cli.runs.out_files import SAMPLES, TASKS
from rlhf_cli.runs.out_folder import FINISHED, FREE, check_no_labels, claim, staging
from rlhf_cli.runs.preflight import Plan, preflight
from rlhf_cli.runs.provenance import GROWING

if TYPE_CHECKING:
    from rlhf_cli.evaluation.judge_asks import KeptJudge
    from rlhf_cli.runs.policy import Policy
    from rlhf_cli.runs.session import Session

REPORT = "report.json"


def run(cfg: LabelConfig, plan: Plan | None = None) -> Path:
    """Sample tasks, collect labels, seal them as rows with a report; returns `out`.

    Raises:
        RunError: tasks are left that nobody has labelled; the same command goes on.
    """
    if plan is None or (plan.provenance is None and plan.state != FINISHED):
        plan = preflight(cfg)
    if plan.state != FINISHED and cfg.judge is not None:
        from rlhf_cli.evaluation.judge_questions import Questions

        Questions.of(cfg)  # a fault of its files is said before anything is sampled
    if plan.state != FINISHED and not sampled_before(cfg, plan):
        sample_tasks(cfg, plan)
    if plan.state != FINISHED:
        desks = collected(cfg, plan)
        left = sum(desk.left for desk in desks.values())
        if left and not cfg.accept_partial:
            raise RunError(left_over(cfg, desks))
    if cfg.review and reviewed(cfg) and plan.state == FINISHED:
        plan = preflight(cfg)  # it is no longer sealed
    return sealed(cfg, plan)


def reviewed(cfg: LabelConfig) -> bool:
    """Show what is disagreed on until that is finished with; returns whether an answer was given.

    What was sealed is open from the first answer on, so that nothing reads the rows of before.
    """
    from rlhf_cli.labelling import review

    out = Path(cfg.out)
    lock(out)
    changed = review.show(desks_of(cfg), cfg.port, lambda: remove([out / MANIFEST]))
    if not changed and (out / MANIFEST).is_file():
        unlock(out)
    return changed


def sampled_before(cfg: LabelConfig, plan: Plan) -> bool:
    """Whether the tasks are there; the folder is this run's own then.

    Raises:
        UserError: labels of people would be lost.
    """
    out = Path(cfg.out)
    if plan.state == FREE:
        check_no_labels(out)
    if plan.state == FREE or not (out / TASKS).is_file():
        return False
    assert plan.provenance is not None  # a finished or checked run does not come here
    claim(cfg, plan.provenance)
    return True


def left_over(cfg: LabelConfig, desks: dict[str, Desk]) -> str:
    """What is to be done still, in a line."""
    done = sum(len(desk.turns) - desk.left for desk in desks.values())
    whole = sum(len(desk.turns) for desk in desks.values())
    others = [name for name, desk in desks.items() if desk.left]
    who = "" if len(desks) == 1 or cfg.source == "file" else f"; who={others[0]} is next"
    return (
        f"{cfg.out}: {done} of {whole} labels are kept; the same command goes on{who}, "
        "accept_partial=true seals what is there"
    )


# --------------------------------------------------------------------------- tasks


def sample_tasks(cfg: LabelConfig, plan: Plan) -> None:
    """Write tasks.jsonl: what the policies respond, or what samples=FILE has."""
    planted, plain = planted_of(cfg), only_drawn(cfg)
    seed = derived_seed(cfg.seed, "label")
    samples = as_they_are(cfg, plan) if plain else computed(cfg, plan)
    pool, dropped = pool_of(samples, cfg.algo, seed)
    if plain:
        tasks = tasks_in(pool, at_random(pool, pool.tasks, seed))
    else:
        from rlhf_cli.labelling.pool import judges_that_know
        from rlhf_cli.labelling.selection import chosen

        tasks = chosen(pool, cfg.algo, judges_that_know(cfg, samples), seed)
    if cfg.algo.protocol == STEPS:
        tasks = [
            replace(task, steps=steps_of(task.responses[0], cfg.data, task.source))
            for task in tasks
        ]
    drawn = sum(task.selected == RANDOM for task in tasks)
    by_rule = f" ({drawn} at random, {len(tasks) - drawn} by {cfg.algo.select})"
    told = by_rule if cfg.algo.select != RANDOM else ""
    say(
        f"{len(tasks)} tasks{told} of {len(samples)} responses; {dropped['empty']} empty and "
        f"{dropped['identical']} identical ones and {dropped['prompts']} prompts with too few left "
        "are dropped"
    )
    if cfg.algo.tasks is not None and len(tasks) < cfg.algo.tasks:
        say(f"note: algo.tasks={cfg.algo.tasks}, but the responses make no more than {len(tasks)}")
    if not tasks:
        raise UserError(
            "no prompt has two different responses: raise algo.samples or algo.temperature"
        )
    check_lock(Path(cfg.out))
    write_tasks(Path(cfg.out), with_planted(tasks, planted))
    interrupts.wait_no_more("the tasks are sampled")  # nothing is lost by an end from here on


def as_they_are(cfg: LabelConfig, plan: Plan) -> list[Sample]:
    """The responses of samples=FILE, without torch: the page is there at once."""
    assert plan.provenance is not None  # it is not finished
    samples = new_samples(cfg)
    for line in [*plan.at_once(), *plan.at_start()]:
        say(line)
    claim(cfg, plan.provenance)
    return samples


def computed(cfg: LabelConfig, plan: Plan) -> list[Sample]:
    """Responses that are sampled, or those of samples=FILE to be scored or chosen."""
    from rlhf_cli.labelling.pool import given_samples, sampled
    from rlhf_cli.runs.begin import begin

    session = begin(cfg, plan)
    assert session is not None  # it is not finished
    session.trackers = None  # they are told by the session that seals: it has the figures
    return given_samples(session) if cfg.samples else sampled(session)


def planted_of(cfg: LabelConfig) -> list[Task]:
    """The tasks with known answers, and the anchors."""
    known, anchors = [], []
    if cfg.known is not None:
        known = known_tasks(cfg.known, cfg.algo.protocol, cfg.data.step_join)
    if cfg.anchors is not None:
        seed = derived_seed(cfg.seed, "anchors")
        anchors = anchor_tasks(cfg.anchors, cfg.algo.protocol, cfg.algo.anchor_tasks, seed)
    if planted := [*known, *anchors]:
        say(f"{len(known)} tasks with known answers and {len(anchors)} anchors go to everybody")
    return planted


# --------------------------------------------------------------------------- labels


def collected(cfg: LabelConfig, plan: Plan) -> dict[str, Desk]:
    """Let whoever labels answer what is left."""
    desks = desks_of(cfg)
    if cfg.source == "file":
        assert cfg.labels is not None  # validate() asks for it
        label_by_file(desks, cfg.labels, Path(cfg.out))
    elif cfg.source == "reward":
        for desk in desks.values():
            label_by_reward(desk, cfg.flip, derived_seed(cfg.seed, "flip"))
    elif cfg.source == "judge":
        from rlhf_cli.labelling.by_judge import label_by_judge
        from rlhf_cli.runs.begin import begin

        (desk,) = desks.values()
        judge = judge_for(cfg, lambda: begin(cfg, plan))
        label_by_judge(desk, judge, cfg.judge_tie, cfg.accept_partial)
    elif cfg.source == "page":
        from rlhf_cli.labelling import server

        server.label(desks, instructions_of(cfg), cfg.accept_partial, cfg.port)
    else:
        terminal.label(desks[cfg.who or cfg.annotators[0]], instructions_of(cfg))
    return desks


def judge_for(cfg: LabelConfig, session_of: Callable[[], "Session | None"]) -> "KeptJudge":
    """The language model that judges; a folder is loaded, for which a session is needed."""
    from rlhf_cli.evaluation.judge_asks import judge_of
    from rlhf_cli.runs.policy import policy_of

    def load(path: str) -> "Policy":
        session = session_of()
        assert session is not None  # it is not finished
        return policy_of(session, path)

    return judge_of(cfg, load)


# --------------------------------------------------------------------------- the end


def sealed(cfg: LabelConfig, plan: Plan) -> Path:
    """Write rows and report, and seal the folder."""
    from rlhf_cli.labelling import report as reporting
    from rlhf_cli.labelling.summary import headline, sentence
    from rlhf_cli.rewards.models import log_odds_of
    from rlhf_cli.runs.begin import begin

    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    session.claim()
    (session.out / SAMPLES).unlink(missing_ok=True)  # a link to what tasks were sampled from
    desks = list(desks_of(cfg).values())
    tasks = read_tasks(session.out)
    answers = counted((each for desk in desks for each in desk.answered), cfg.algo.protocol)
    if not answers:
        raise RunError(f"{cfg.out}: no task has a label, so there is nothing to seal")
    if cfg.algo.aggregate == MAJORITY:
        answers = by_majority(answers)
    made = rows_of(answers, cfg.algo.protocol)
    scale = None if cfg.reward is None else log_odds_of(cfg.reward)
    report = reporting.report_of(desks, tasks, derived_seed(cfg.seed, "ratings"), scale)
    report["rows"] = {name: len(rows) for name, rows in made.items()}
    if cfg.flip:
        report["flips"] = reporting.planted_errors(report, cfg.flip, desks, tasks)
    if cfg.judge is not None:
        tell_of_judge(cfg, report, desks, session)
    folder = staging(session.out)
    for name, rows in made.items():
        if rows:  # a file without rows is none
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name).write_text(text, encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(round_figures(report), indent=2) + "\n")
    show(report)
    return session.finish("labels", headline(report), sentence(report), **made_from(session))


def made_from(session: "Session") -> dict[str, Any]:
    """For stage.json: beside what the run began with labels=FILE as it was sealed."""
    assert session.plan.provenance is not None  # it is not finished
    begun, now = begun_with(session.out), session.plan.provenance["inputs"]
    grown = {GROWING: now[GROWING]} if GROWING in now else {}
    return {"inputs": {**(begun.get("inputs") or {}), **grown}}


def tell_of_judge(
    cfg: LabelConfig, report: dict[str, Any], desks: list[Desk], session: "Session"
) -> None:
    """Put into a report what it tells of the judge who labelled, or of one beside people.

    Raises:
        RunError: one beside people cannot be asked, and `accept_partial` does not do without it.
    """
    from rlhf_cli.evaluation.judge_asks import Unasked
    from rlhf_cli.labelling.judge_quality import as_annotator, beside_people, doubts

    if cfg.source == "judge":
        report["judge"] = as_annotator(cfg, desks[0])
    else:
        judge = judge_for(cfg, lambda: session)
        try:
            report["judge"], report["with_judge"] = beside_people(cfg, judge, desks)
        except Unasked as fault:
            if not cfg.accept_partial:
                raise RunError(f"{fault}; accept_partial=true seals without the judge") from None
            say(f"{fault}; sealed without the judge")
            return
    for line in doubts(report):
        say(line)


def show(report: dict[str, Any]) -> None:
    """Ratings as a table, how far labels and judges are right, and what is not told apart."""
    from rlhf_cli.labelling.quality import lines_of
    from rlhf_cli.labelling.summary import beliefs, inseparable, labels_at_random, table_of

    if lines := table_of(report):
        heads = ("policy", "rating", "95 %", "above")[: len(lines[0])]
        if len(lines[0]) == 3:
            heads = ("policy", "up", "labels")
        table("", heads, lines)
    for line in (*lines_of(report), *beliefs(report)):
        say(line)
    for ours, theirs in inseparable(report):
        say(f"{ours} and {theirs} are not separable by {labels_at_random(report)} labels")
