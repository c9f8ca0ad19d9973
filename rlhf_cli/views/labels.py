"""Labels as a page shows them: who labelled how much, how far they agree, and how policies fare."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import median
from types import SimpleNamespace
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.labelling.answers import FLAG, SKIP
from rlhf_cli.labelling.desk import Desk, desks_of
from rlhf_cli.reporting.plots import numbers
from rlhf_cli.runs.lineage import command_of
from rlhf_cli.views import charts
from rlhf_cli.views.grids import Column, count_of, grid, share_of, within
from rlhf_cli.views.html import cell, listed, remark, said, with_stderr
from rlhf_cli.views.label_policies import policies, ratings, wins
from rlhf_cli.views.records import Record

LABEL = "label"  # the stage
AGREEMENTS = {
    "between_annotators": "of annotators",
    "with_themselves": "with themselves",
    "with_reward": "with the reward",
    "with_judge": "with the judge",
}
"""Who agrees with whom, by where the report has it."""

JUDGE = ("judge", "failed", "calls", "cached", "cost")
JUDGED = {
    "consistency": "both orders agree",
    "first_slot": "the first one shown",
    "longer_wins": "the longer one",
}
"""What is said of a judge, and with an interval."""

BIASES = {"first_shown_wins": "the first one shown", "longer_wins": "the longer one"}


def is_sealed(record: Record) -> bool:
    """Whether all was labelled that was to be, and its rows are there."""
    return bool(record.manifest.get("complete"))


def desks_in(record: Record) -> list[Desk]:
    """The desks of a label folder with what was answered; none where it cannot be read."""
    config = {**record.config, "out": str(record.folder), "instructions": None}
    with suppress(UserError, OSError, AttributeError, TypeError, ValueError, LookupError):
        return list(desks_of(_namespace(config)).values())
    return []


def _namespace(config: Any) -> Any:
    """A config as it was written, read as a typed one is."""
    if not isinstance(config, dict):
        return config
    return SimpleNamespace(**{key: _namespace(value) for key, value in config.items()})


# --------------------------------------------------------------------------- figures


def figures_of(record: Record, drawn: Callable[[Sequence[charts.Figure | None]], str]) -> str:
    """Who labelled how much, how far it can be relied on, and how policies fare, as HTML.

    Args:
        drawn: makes elements of figures.
    """
    desks, report = desks_in(record), record.report
    parts = [about(record, desks), annotators(report, desks)]
    if report:
        parts += [selected(report), agreements(report), biases(report), flips(report)]
        parts += [of_judge(report), beliefs(report, drawn), anchors(report), ratings(report)]
        parts += [policies(report, drawn), wins(report)]
    return "\n".join(filter(None, parts))


def about(record: Record, desks: Sequence[Desk]) -> str:
    """What was asked, and what is left where it is not sealed."""
    report = record.report
    facts = [f"{said(report[key])} {key}" for key in ("labels", "tasks") if report.get(key)]
    facts += [f"{key} {said(report[key])}" for key in ("protocol", "source") if report.get(key)]
    if report.get("reviewed"):
        facts.append(f"{said(report['reviewed'])} answers are those of a review")
    if known := numbers(report, "ties"):
        facts.append(f"{known[0]:.3f} of the pairs tie")
    lines = [f"{'; '.join(facts)}."] if facts else []
    if not is_sealed(record):
        done = sum(len(desk.turns) - desk.left for desk in desks)
        whole = sum(len(desk.turns) for desk in desks)
        left = listed(f"{desk.who} {desk.left}" for desk in desks if desk.left)
        told = f"Not sealed: {done} of {whole} labels are there" if desks else "Not sealed"
        lines.append(f"{told}{f'; left: {left}' if left else ''}.")
        if command := command_of(record.folder):
            lines.append(f"<code>{said(command)}</code> goes on.")
    return remark(" ".join(lines))


def annotators(report: Mapping[str, Any], desks: Sequence[Desk]) -> str:
    """A line for each."""
    told = report.get("annotators") or {desk.who: tally(desk) for desk in desks}
    return grid("annotator", told, OF_ONE)


def tally(desk: Desk) -> dict[str, Any]:
    """What somebody has done so far."""
    kinds = [event["kind"] for _, event in desk.answered]
    seconds = [event["seconds"] for _, event in desk.answered if event.get("seconds")]
    return {
        "turns": len(desk.turns),
        "answered": len(kinds),
        "skipped": kinds.count(SKIP),
        "flagged": kinds.count(FLAG),
        "seconds_median": median(seconds) if seconds else None,
    }


def selected(report: Mapping[str, Any]) -> str:
    """How many tasks each rule has chosen, where one has."""
    body = grid("tasks", report.get("selected") or {}, OF_RULE)
    note = "Agreement, biases and ratings go by the tasks that were drawn at random."
    return body and body + remark(note)


def agreements(report: Mapping[str, Any]) -> str:
    """Who agrees with whom, and on how much."""
    found = {who: report[key] for key, who in AGREEMENTS.items() if report.get(key)}
    note = (
        "± is a standard error and brackets hold 95%, both over prompts; alpha (Krippendorff) is 0 "
        "where chance agrees as often."
    )
    body = grid("agreement", found, OF_AGREEMENT)
    return body and body + remark(note)


def _left(each: Mapping[str, Any]) -> str | None:
    known = numbers(each, "turns", "answered")
    return f"{known[0] - known[1]:.0f}" if known else None


def _right(each: Mapping[str, Any]) -> str | None:
    """How often somebody is right where it is known what is."""
    known = each.get("known") or {}
    count = cell(known, "outcomes", ".0f")
    share = with_stderr(known, "right", "stderr")
    return f"{share} of {count}" if share and count else share


OF_ONE: dict[str, Column] = {
    "turns": count_of("turns"),
    "answered": count_of("answered"),
    "left": _left,
    "skipped": count_of("skipped"),
    "flagged": count_of("flagged"),
    "median seconds": lambda each: cell(each, "seconds_median", ".3g"),
    "agrees with itself": share_of("self_agreement"),
    "right where it is known": _right,
}
"""On one annotator."""

OF_AGREEMENT: dict[str, Column] = {
    "all": lambda each: with_stderr(each, "agreement", "stderr"),
    "outcomes": count_of("outcomes"),
    "tasks": count_of("tasks"),
    "without ties": within("decided", "decided_low", "decided_high"),
    "outcomes without ties": count_of("decided_outcomes"),
    "alpha": within("alpha", "alpha_low", "alpha_high"),
    "ordinal alpha": within("alpha_ordinal", "alpha_ordinal_low", "alpha_ordinal_high"),
}
OF_RULE: dict[str, Column] = {"tasks": count_of("tasks"), "labels": count_of("labels")}
OF_ANCHOR: dict[str, Column] = {
    "share": lambda each: (
        with_stderr(each, "share", "stderr") or with_stderr(each, "agreement", "stderr")
    ),
    "outcomes": count_of("outcomes"),
}
OF_BIAS: dict[str, Column] = {"share": within("share"), "decided pairs": count_of("pairs")}
OF_JUDGE: dict[str, Column] = {"share": within("mean")}
OF_BELIEF: dict[str, Column] = {
    "Brier score": lambda each: with_stderr(each, "brier", "brier_stderr"),
    "calibration error": share_of("calibration_error"),
    "pairs": count_of("pairs"),
}
OF_FLIPS: dict[str, Column] = {
    "chance": share_of("chance"),
    "planted": share_of("planted"),
    "recovered from agreement": within("recovered", "recovered_low", "recovered_high"),
}


def biases(report: Mapping[str, Any]) -> str:
    """How often what has nothing to do with the text wins."""
    rows = {BIASES.get(key, key): each for key, each in (report.get("bias") or {}).items()}
    if longer := (report.get("with_reward") or {}).get("longer_wins"):
        rows[f"{BIASES['longer_wins']}, by the reward"] = longer
    return grid("who wins", rows, OF_BIAS)


def flips(report: Mapping[str, Any]) -> str:
    """Errors that were planted, and what of them the agreement tells."""
    return grid("errors", {"labels turned round": report.get("flips") or {}}, OF_FLIPS)


def of_judge(report: Mapping[str, Any]) -> str:
    """What a language model that judges goes by beside the texts, and what it cost."""
    found = report.get("judge") or {}
    rows = {called: found[key] for key, called in JUDGED.items() if found.get(key)}
    if preferred := (report.get("with_judge") or {}).get("preferred"):
        rows["prefers what annotators do"] = preferred
    facts = [f"{key} {said(found[key])}" for key in JUDGE if found.get(key) is not None]
    note = remark(f"{'; '.join(facts)}.") if facts else ""
    return grid("judge", rows, OF_JUDGE) + note


def beliefs(
    report: Mapping[str, Any], drawn: Callable[[Sequence[charts.Figure | None]], str]
) -> str:
    """How far a judge and a reward can be believed how sure they are, where people have judged."""
    told = {"judge": report.get("judge") or {}, "reward": report.get("with_reward") or {}}
    found = {who: each["calibration"] for who, each in told.items() if each.get("calibration")}
    body = grid("how sure", {f"the {who}": each for who, each in found.items()}, OF_BELIEF)
    note = (
        "A Brier score of 0.25 is that of always saying one half, 0 that of knowing; points below "
        "the line are of pairs on which it is too sure."
    )
    figures = [charts.calibration_figure(each, who) for who, each in found.items()]
    return body and body + drawn(figures) + remark(note)


def anchors(report: Mapping[str, Any]) -> str:
    """What tasks that came in earlier runs as well were said to be, then and now."""
    found = report.get("anchors") or {}
    rows = {"as before": found["same"]} if found.get("same") else {}
    rows |= {
        f"{name}, {run.get('out')}": rate
        for run in found.get("runs") or []
        for name, rate in (run.get("rates") or {}).items()
    }
    return grid("anchors", rows, OF_ANCHOR)
