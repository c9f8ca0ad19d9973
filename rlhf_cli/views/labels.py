"""Labels as a page shows them: who labelled how much, how far they agree, and how policies fare."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from statistics import median
from types import SimpleNamespace
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.labelling.answers import FLAG, SKIP
from rlhf_cli.labelling.desk import Desk, desks_of
from rlhf_cli.labelling.tasks import RANDOM
from rlhf_cli.reporting.plots import numbers
from rlhf_cli.runs.lineage import command_of
from rlhf_cli.views import charts
from rlhf_cli.views.html import cell, listed, said, table, with_stderr
from rlhf_cli.views.records import Record

LABEL = "label"  # the stage
AGREEMENTS = {
    "between_annotators": "of annotators",
    "with_themselves": "with themselves",
    "with_reward": "with the reward",
    "with_judge": "with the judge",
}
"""Who agrees with whom, by where the report has it."""

Column = Callable[[Mapping[str, Any]], str | None]
"""What a table says of figures; None where they do not know it."""

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
        parts += [of_judge(report), anchors(report), ratings(report)]
        parts.append(policies(report, drawn))
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
    return f'<p class="note">{" ".join(lines)}</p>' if lines else ""


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
    return body and f'{body}<p class="note">{note}</p>'


def agreements(report: Mapping[str, Any]) -> str:
    """Who agrees with whom, and on how much."""
    found = {who: report[key] for key, who in AGREEMENTS.items() if report.get(key)}
    note = (
        "± is a standard error over tasks; alpha (Krippendorff) is 0 where chance agrees as often."
    )
    body = grid("agreement", found, OF_AGREEMENT)
    return body and f'{body}<p class="note">{note}</p>'


def grid(head: str, told: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """A table with a row for each name, and the columns of which something is known."""
    cells = {title: [of(each) for each in told.values()] for title, of in columns.items()}
    known = {title: column for title, column in cells.items() if any(column)}
    rows = [list(row) for row in zip(map(said, told), *known.values(), strict=True)]
    return table([head, *known], rows) if rows and known else ""


def count_of(key: str) -> Column:
    """A column of whole numbers."""
    return lambda each: cell(each, key, ".0f")


def share_of(key: str) -> Column:
    """A column of shares."""
    return lambda each: cell(each, key, ".3f")


def _left(each: Mapping[str, Any]) -> str | None:
    known = numbers(each, "turns", "answered")
    return f"{known[0] - known[1]:.0f}" if known else None


def _right(each: Mapping[str, Any]) -> str | None:
    """How often somebody is right where it is known what is."""
    known = each.get("known") or {}
    count = cell(known, "outcomes", ".0f")
    share = with_stderr(known, "right", "stderr")
    return f"{share} of {count}" if share and count else share


def _interval(each: Mapping[str, Any]) -> str | None:
    ends = numbers(each, "low", "high")
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else None


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
    "without ties": share_of("decided"),
    "outcomes without ties": count_of("decided_outcomes"),
    "alpha": share_of("alpha"),
    "ordinal alpha": share_of("alpha_ordinal"),
}
OF_RULE: dict[str, Column] = {"tasks": count_of("tasks"), "labels": count_of("labels")}
OF_ANCHOR: dict[str, Column] = {
    "share": lambda each: (
        with_stderr(each, "share", "stderr") or with_stderr(each, "agreement", "stderr")
    ),
    "outcomes": count_of("outcomes"),
}
OF_BIAS: dict[str, Column] = {
    "share": share_of("share"),
    "95%": _interval,
    "decided pairs": count_of("pairs"),
}
OF_JUDGE: dict[str, Column] = {"share": share_of("mean"), "95%": _interval}
OF_FLIPS: dict[str, Column] = {
    "chance": share_of("chance"),
    "planted": share_of("planted"),
    "recovered from agreement": share_of("recovered"),
}


def biases(report: Mapping[str, Any]) -> str:
    """How often what has nothing to do with the text wins."""
    bias = report.get("bias") or {}
    return grid("wins", {BIASES.get(key, key): each for key, each in bias.items()}, OF_BIAS)


def flips(report: Mapping[str, Any]) -> str:
    """Errors that were planted, and what of them the agreement tells."""
    return grid("", {"labels turned round": report.get("flips") or {}}, OF_FLIPS)


def of_judge(report: Mapping[str, Any]) -> str:
    """What a language model that judges goes by beside the texts, and what it cost."""
    found = report.get("judge") or {}
    rows = {called: found[key] for key, called in JUDGED.items() if found.get(key)}
    if preferred := (report.get("with_judge") or {}).get("preferred"):
        rows["prefers what annotators do"] = preferred
    facts = [f"{key} {said(found[key])}" for key in JUDGE if found.get(key) is not None]
    note = f'<p class="note">{"; ".join(facts)}.</p>' if facts else ""
    return grid("judge", rows, OF_JUDGE) + note


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


def ratings(report: Mapping[str, Any]) -> str:
    """Of policies whose responses were rated and marked, the means."""
    scores = report.get("scores") or {}
    marks = {name for each in scores.values() for name, share in marked(each).items() if share}
    columns = {"rating": lambda each: with_stderr(each, "score", "stderr")}
    columns |= {"ratings": count_of("ratings")}
    columns |= {name.replace("_", " "): mark_of(name) for name in sorted(marks)}
    name_of = charts.names_for(scores)
    body = grid("policy", {name_of(path): each for path, each in scores.items()}, columns)
    against = with_stderr(report.get("contradictions"), "share", "stderr")
    note = f"The better ranked of two has the lower rating in {against} of the pairs."
    return body + (f'<p class="note">{note}</p>' if against else "")


def mark_of(name: str) -> Column:
    """How often a mark is there."""
    return lambda each: cell(marked(each), name, ".3f")


def marked(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The shares of a policy's responses that have each mark."""
    return each.get("marks") or {}


def policies(
    report: Mapping[str, Any], drawn: Callable[[Sequence[charts.Figure | None]], str]
) -> str:
    """How policies fare, with intervals, and whom the labels do not tell apart."""
    found = report.get("ratings") or {}
    name_of = charts.names_for(found)
    if any("up" in (each or {}) for each in found.values()):
        across = "share of responses that are good"
        figure = charts.intervals_figure("liked", "Good responses", across, "up", found, name_of)
        note = "Bars are 95%, clustered by prompt."
    else:
        figure = charts.ratings_figure({"ratings": found}, name_of)
        note = "Bradley-Terry on Elo's scale, over all pairs within a task; bars are 95%."
        alike = [
            f"{name_of(one)} and {name_of(other)}"
            for one, other in combinations(found, 2)
            if other not in (found[one].get("above") or [])
            and one not in (found[other].get("above") or [])
        ]
        if left := [name_of(path) for path, each in found.items() if not numbers(each, "rating")]:
            note += f" Not rated: {listed(left)}."
        if alike:
            drawn_of = (report.get("selected") or {}).get(RANDOM, report)
            note += f" Not separable at {said(drawn_of.get('tasks'))} tasks: {listed(alike)}."
    if not (body := drawn([figure])):
        return ""
    return f'{body}<p class="note">{note}</p>'
