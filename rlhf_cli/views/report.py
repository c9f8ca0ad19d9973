"""Runs as one page: what was made from what, what it says, how it went, and with which settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import place_in_chain
from rlhf_cli.config.switches import written
from rlhf_cli.evaluation.frontier import runs_of
from rlhf_cli.reporting.grid import show, with_error
from rlhf_cli.reporting.plots import LIGHT, embedded, numbers, theme, unchecked
from rlhf_cli.runs.comparison import (
    ENDS,
    PLACES,
    Compared,
    differing,
    figure_names,
    names_of,
    read_run,
)
from rlhf_cli.runs.config_diff import as_named_now, flatten
from rlhf_cli.runs.lineage import INPUTS, Node, arranged, command_of, config_text, runs_in
from rlhf_cli.runs.provenance import ROWS
from rlhf_cli.views import charts
from rlhf_cli.views.charts import Figure, Group
from rlhf_cli.views.html import (
    Section,
    cell,
    folded,
    listed,
    page,
    remark,
    said,
    table,
    with_stderr,
)
from rlhf_cli.views.label_tasks import shelves_of
from rlhf_cli.views.labels import LABEL, figures_of
from rlhf_cli.views.matrix import matrix_figure
from rlhf_cli.views.records import Record, read_record
from rlhf_cli.views.samples import samples_of

SEED = "seed"
MOST_COLUMNS = 6  # of runs beside each other; more are lines
ONLINE = ("ppo", "grpo")


@dataclass
class Runs:
    """What a page shows, and what is drawn on it.

    names: what each record is called, in the order of records.
    figures: those that the page has so far, by the name that its element asks for.
    """

    records: list[Record]
    names: list[str]
    figures: dict[str, Figure] = field(default_factory=dict)

    @cached_property
    def samples(self) -> Any:
        """What the browser of samples shows; nothing where no run has any."""
        return samples_of(self.records, shelves_of(self.records))

    @property
    def evaluations(self) -> list[tuple[str, Record]]:
        """Those that judged policies, by name."""
        pairs = zip(self.names, self.records, strict=True)
        return [(name, each) for name, each in pairs if each.report.get("policies")]

    def drawn(self, figures: Sequence[Figure | None]) -> str:
        """Elements that scripts draw figures in; nothing of none."""
        elements = [self._element(each) for each in figures if each is not None]
        return f'<div class="charts">{"".join(elements)}</div>' if elements else ""

    def _element(self, figure: Figure) -> str:
        name, count = figure.name, 2
        while name in self.figures:
            name, count = f"{figure.name}-{count}", count + 1
        self.figures[name] = figure
        label = said(f"{figure.title}. {figure.said}")
        panels = "".join(
            f'<div class="chart" data-chart="{name}.{i}" role="img" aria-label="{label}"></div>'
            for i in range(len(figure.panels))
        )
        start = '<figure class="whole">' if figure.whole else "<figure>"
        caption = f"<figcaption>{said(figure.title)}</figcaption>"
        return f"{start}{caption}{figure.table or panels}</figure>"


def runs_at(places: Sequence[Path]) -> Runs:
    """The runs in and below places, in the order of a chain.

    Raises:
        UserError: a place is no folder, or holds no run.
    """
    for place in places:
        if not place.is_dir():
            raise UserError(f"report: no folder {place}")
        if next(runs_in([place]), None) is None:
            raise UserError(f"report: no runs in {place}; see rlhf-cli ls runs")
    folders = list({each.resolve(): each for each in runs_in(places)}.values())
    records = [read_record(folder) for folder in folders]
    records.sort(key=lambda each: (place_in_chain(each.node.stage), str(each.folder)))
    folders = [each.folder for each in records]
    names = names_of(folders) if len(folders) > 1 else [folders[0].resolve().name]
    return Runs(records, names)


def report(runs: Runs, title: str) -> str:
    """The page."""
    with ThreadPoolExecutor(1) as pool:  # it takes as long as all else, and another processor
        library = pool.submit(drawing_library)
        with unchecked():
            sections = sections_of(runs)
            data = data_of(runs)
        return page(title, sections, data, library.result())


def drawing_library() -> str:
    """Vega-Embed, Vega-Lite and Vega as a script."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def sections_of(runs: Runs) -> list[Section]:
    """The parts of the page that have something to show, in their order."""
    parts = [
        Section("lineage", "Lineage", lineage(runs)),
        Section("labels", "Labels", labels(runs)),
        Section("policies", "Policies", policies(runs)),
        Section("frontier", "Frontier", frontier(runs)),
        Section("wins", "Win rates", win_rates(runs)),
        Section("ratings", "Ratings", ratings(runs)),
        Section("rewards", "Rewards before and after", rewards(runs)),
        Section("calibration", "Calibration", calibration(runs)),
        Section("samples", "Samples") if runs.samples else None,  # samples.js fills it
        Section("curves", "Training", training(runs)),
        Section("settings", "Settings", settings(runs)),
    ]
    return [each for each in parts if each is not None and (each.body or each.name == "samples")]


def data_of(runs: Runs) -> dict[str, Any]:
    """What the scripts of the page read."""
    specs = {
        f"{name}.{i}": embedded(panel)
        for name, figure in runs.figures.items()
        for i, panel in enumerate(figure.panels)
        if not figure.table
    }
    look = {**{name: f"var(--{name})" for name in LIGHT}, "page": "transparent"}
    return {"charts": specs, "theme": theme(look), "samples": runs.samples}


# --------------------------------------------------------------------------- lineage


def lineage(runs: Runs) -> str:
    """A table of runs, each below the one whose weights it goes on from."""
    names = {id(each.node): name for each, name in zip(runs.records, runs.names, strict=True)}
    rows = [
        [
            f'<span class="depth" style="--depth: {depth}">{said(names[id(node)])}</span>',
            said(node.stage or "?"),
            node.made_with and said(node.made_with),
            f'<span class="state {state_word(node)}">{said(node.state)}</span>',
            None if node.seed is None else str(node.seed),
            None if node.seconds is None else duration(node.seconds),
            when(node.ended),
            ", ".join(f"{said(name)} {show(value)}" for name, value in node.figures.items())
            or None,
            sources(node) or None,
        ]
        for depth, node in branches(arranged(each.node for each in runs.records))
    ]
    heads = ["run", "stage", "algo", "state", "seed", "time", "ended", "metric", "made from"]
    return table(heads, rows, look="lineage")


def branches(nodes: Sequence[Node], depth: int = 0) -> Iterator[tuple[int, Node]]:
    """Every run with how many it descends from, those made from it after it."""
    for node in nodes:
        yield depth, node
        yield from branches(node.children, depth + 1)


def sources(node: Node) -> str:
    """What a run read, by its role, and what of it is gone; of files of rows their folder."""
    roles: dict[str, list[str]] = {}
    folders = [each.place for each in node.sources if each.role == ROWS]
    for each in node.sources:
        if each.kind == INPUTS and each.place.parent in folders:
            continue
        gone = " <em>is gone</em>" if each.fault == "is gone" else ""
        roles.setdefault(each.role, []).append(said(each.path) + gone)
    return "<br>".join(f"{said(role)}: {', '.join(paths)}" for role, paths in roles.items())


def state_word(node: Node) -> str:
    """finished, stopped, unfinished, running or damaged."""
    return node.state.split()[0]


def duration(seconds: float) -> str:
    """37 s, 12 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def when(ended: float | None) -> str | None:
    """A time of day that is the same wherever the page is read."""
    return None if ended is None else f"{datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M} UTC"


# --------------------------------------------------------------------------- labels


def labels(runs: Runs) -> str:
    """Of each label folder who labelled how much, how far they agree, and how policies fare."""
    found = [
        (name, figures_of(record, runs.drawn))
        for name, record in zip(runs.names, runs.records, strict=True)
        if record.node.stage == LABEL
    ]
    note = (
        'All tasks are among the <a href="#samples">samples</a>, with what everybody said. There '
        '"won" is the share of its comparisons that a response won, ties half; of one that is '
        "judged by itself, how often it is good."
    )
    texts = [f"<h3>{said(name)}</h3>\n{text}" if len(found) > 1 else text for name, text in found]
    return "\n".join([*texts, remark(note)] if found and runs.samples else texts)


# --------------------------------------------------------------------------- evaluations


def each_evaluation(runs: Runs, body: Callable[[dict[str, Any], Callable[[str], str]], str]) -> str:
    """What all evaluations have of something, under their names where there are several."""
    parts = []
    for name, record in runs.evaluations:
        runs_kept = runs_of(record.report.get("frontier") or [])
        text = body(record.report, charts.names_for((*record.report["policies"], *runs_kept)))
        if text:
            parts.append(f"<h3>{said(name)}</h3>\n{text}" if len(runs.evaluations) > 1 else text)
    return "\n".join(parts)


ESTIMATES = {
    "gold": "gold",
    "reward": "reward",
    "gain_over_reference": "gain",
    "kl": "KL, nats",
    "text_loss": "text loss",
    "choices": "choices",
    "entropy": "entropy",
    "length": "length",
    "ended": "ended",
}
"""Figures of a policy, by what they are called in the table."""


SHARES = ("win", "tie", "loss")
COUNTS = {"prompts": "prompts", "samples": "samples of each"}


def policies(runs: Runs) -> str:
    """A table of the figures of each policy."""
    return each_evaluation(runs, _policies)


def _policies(report: dict[str, Any], name_of: Callable[[str], str]) -> str:
    found = report["policies"]
    used = [key for key in ESTIMATES if any(estimate(each, key) for each in found.values())]
    ratings = report.get("ratings") or {}
    order = sorted(found, key=lambda path: -(numbers(ratings.get(path), "rating") or [0.0])[0])
    rows = [[said(name_of(path)), *(estimate(found[path], key) for key in used)] for path in order]
    facts = [f"{said(report[key])} {of}" for key, of in COUNTS.items() if report.get(key)]
    named = ("temperature", "reward", "gold")
    facts += [f"{key} {said(report[key])}" for key in named if report.get(key) is not None]
    if report.get("reference"):
        facts.append(f"KL and gain to {said(name_of(report['reference']))}")
    told = [*facts, "± is a standard error, clustered by prompt"]
    if any(None in row for row in rows):
        told.append("– is not known, or infinite")
    note = remark(f"{'; '.join(told)}.")
    return table(["policy", *(ESTIMATES[key] for key in used)], rows) + note


def estimate(figures: dict[str, Any], key: str) -> str | None:
    """A figure with its error, in it or beside it."""
    value = figures.get(key)
    if key == "kl" and value is None and (bound := estimate(figures, "kl_bound")):
        return f"at most {bound}"
    if isinstance(value, dict):
        return with_stderr(value, "mean", "stderr")
    return with_stderr(figures, key, f"{key}_stderr")


def frontier(runs: Runs) -> str:
    """What scores cost in KL."""

    def body(report: dict[str, Any], name_of: Callable[[str], str]) -> str:
        drawn = runs.drawn(charts.frontier_figures(report, name_of))
        note = "Bars are two standard errors. At equal KL, higher is better."
        if left := charts.off_the_frontier(report, name_of):
            note += f" Not drawn, as its KL or score is not known or infinite: {listed(left)}."
        return drawn and drawn + remark(note)

    return each_evaluation(runs, body)


def win_rates(runs: Runs) -> str:
    """The matrix, what policies win against the references, and over temperature."""

    def body(report: dict[str, Any], name_of: Callable[[str], str]) -> str:
        against = report.get("against_references") or {}
        rows = [[said(name_of(path)), *won(each)] for path, each in against.items()]
        heads = ["policy", "win", "tie", "loss", "win + tie / 2, 95%", "p, Holm"]
        beside = table(heads, rows, "against the references of the data") if rows else ""
        figures = [matrix_figure(report, name_of)]
        judge = report.get("judge") or {}
        rows = [
            [said(name_of(path)), *won(each)]
            for path, each in (judge.get("win_rates") or {}).items()
        ]
        title = f"of the first policy against others, as {said(judge.get('judge'))} judges"
        beside += table(["against", *heads[1:]], rows, title) if rows else ""
        drawn = runs.drawn([*figures, *charts.temperature_figures(report, name_of)]) + beside
        note = "Scores of the same prompts are compared; intervals are 95%, clustered by prompt."
        return drawn and drawn + remark(note)

    return each_evaluation(runs, body)


def won(rate: Mapping[str, Any]) -> list[str | None]:
    """Shares, their interval, and the corrected chance that both are as good."""
    shares, ends = numbers(rate, "win", "tie"), numbers(rate, "low", "high")
    score = f"{shares[0] + shares[1] / 2:.3f}" if shares else None
    if score and ends:
        score += f" ({ends[0]:.3f} to {ends[1]:.3f})"
    return [*(cell(rate, key, ".3f") for key in SHARES), score, cell(rate, "p_holm", ".2g")]


def ratings(runs: Runs) -> str:
    """Ratings of all policies, and whom they do not tell apart."""

    def body(report: dict[str, Any], name_of: Callable[[str], str]) -> str:
        rated = report.get("ratings") or {}
        pairs = sorted(
            {
                tuple(sorted((name_of(one), name_of(other))))
                for one, each in rated.items()
                for other in each.get("not_separable") or []
            }
        )
        drawn = runs.drawn([charts.ratings_figure(report, name_of)])
        if not drawn:
            return ""
        note = "Bradley-Terry on Elo's scale"
        note += f", {said(name_of(report['anchor']))} at 0" if report.get("anchor") else ""
        note += "; bars are 95%."
        if pairs:
            alike = listed(f"{one} and {other}" for one, other in pairs)
            count = report.get("prompts")
            note += f" Not separable{f' at {said(count)} prompts' if count else ''}: {alike}."
        if left := [name_of(path) for path, each in rated.items() if not numbers(each, "rating")]:
            note += f" Not rated: {listed(left)}."
        return drawn + remark(note)

    return each_evaluation(runs, body)


def rewards(runs: Runs) -> str:
    """Histograms: of policies beside the reference, and of training from its start to its end."""
    figures: list[Figure | None] = []
    for _, record in runs.evaluations:
        figures += charts.rewards_by_policy(record, charts.names_for(record.report["policies"]))
    online = [
        (name, record)
        for name, record in zip(runs.names, runs.records, strict=True)
        if record.node.stage in ONLINE
    ]
    for name, record in online[: charts.MOST_CURVES]:
        figures.append(charts.rewards_in_training(record, name))
    left = ", ".join(said(name) for name, _ in online[charts.MOST_CURVES :])
    note = remark(f"Not drawn: {left}. Name fewer runs to see them.") if left else ""
    known = [each for each in figures if each is not None]
    first, rest = known[: charts.MOST_CURVES], known[charts.MOST_CURVES :]
    more = folded(f"{len(rest)} more histograms", runs.drawn(rest)) if rest else ""
    return runs.drawn(first) + more + note


def calibration(runs: Runs) -> str:
    """How often scorers are right, over how sure they are."""
    figures: dict[str, Figure | None] = {}
    for name, record in zip(runs.names, runs.records, strict=True):
        judged = record.report.get("reward_model") if record.report.get("policies") else None
        found = judged or record.report
        figure = charts.calibration_figure(found, name)
        figures.setdefault(repr(found.get("calibration_bins")), figure)  # of the same scores, once
    drawn = runs.drawn(list(figures.values()))
    note = "On the dashed line a judgement is right as often as its confidence says; below it less."
    return drawn and drawn + remark(note)


# --------------------------------------------------------------------------- training


def training(runs: Runs) -> str:
    """Curves of each stage, those that matter most first; the others are folded away."""
    parts = []
    for stage in dict.fromkeys(each.node.stage for each in runs.records):
        groups = [each for each in groups_of(runs, stage) if any(r.metrics for r in each.records)]
        names = charts.metrics_of(groups[: charts.MOST_CURVES])
        if not names:
            continue
        first = charts.first_of(names)
        drawn = runs.drawn([charts.training_figure(str(stage), each, groups) for each in first])
        rest = [name for name in names if name not in first]
        others = [charts.training_figure(str(stage), each, groups) for each in rest]
        more = folded(f"{len(others)} more metrics", runs.drawn(others)) if others else ""
        parts.append(f"<h3>{said(stage)}</h3>\n{how_drawn(groups)}{drawn}{more}{constants(groups)}")
    return "\n".join(parts)


def how_drawn(groups: Sequence[Group]) -> str:
    """What of the lines is not one logged number each, where that is so."""
    told = []
    rows = [row for group in groups for record in group.records for row in record.metrics]
    if any(name.startswith(charts.EVAL) for row in rows for name in row):
        told.append("Dashed lines are of held-out rows, bars their 95% intervals.")
    lines = max(len(record.metrics) for group in groups for record in group.records)
    if lines > charts.points_of_each(groups):
        told.append(f"{lines} lines are drawn as means of neighbours, with their span.")
    told += [
        f"{said(each.name)}: mean over seeds, with its 95% interval by Student's t."
        for each in groups
        if len(each.records) > 1
    ]
    if len(groups) > charts.MOST_CURVES:
        left = ", ".join(said(each.name) for each in groups[charts.MOST_CURVES :])
        told.append(f"Not drawn, for want of colours: {left}. Name fewer runs to see them.")
    return remark(" ".join(told))


def constants(groups: Sequence[Group]) -> str:
    """The metrics that have no curve."""
    same = charts.constants_of(groups)
    text = ", ".join(f"{said(name)} {show(value)}" for name, value in same.items())
    return remark(f"The same at every step: {text}.") if text else ""


def groups_of(runs: Runs, stage: str | None) -> list[Group]:
    """The runs of a stage; those that differ in nothing but their seed are one group."""
    found: dict[str, list[tuple[str, Record]]] = {}
    for name, record in zip(runs.names, runs.records, strict=True):
        if record.node.stage == stage:
            config = as_named_now(flatten(record.config))
            same = {key: value for key, value in config.items() if key not in (*PLACES, SEED)}
            key = repr((record.node.made_with, same)) if same else name
            found.setdefault(key, []).append((name, record))
    groups = []
    for each in found.values():
        seeds = {record.node.seed for _, record in each}
        if len(each) > 1 and len(seeds) == len(each):
            title = f"{each[0][0]}, {len(each)} seeds"
            groups.append(Group(title, [record for _, record in each]))
        else:
            groups += [Group(name, [record]) for name, record in each]
    return groups


# --------------------------------------------------------------------------- settings


def settings(runs: Runs) -> str:
    """How runs of a stage differ and what they ended with; below it each config as it was."""
    parts = []
    read = list(map(read_run, (each.folder for each in runs.records), runs.names))
    for stage in dict.fromkeys(each.stage for each in read):
        alike = [each for each in read if each.stage == stage]
        if len(alike) > 1:
            parts.append(f"<h3>{said(stage)}</h3>\n{beside(alike)}")
    parts.append("<h3>Configs</h3>")
    for name, record in zip(runs.names, runs.records, strict=True):
        text = config_text(record.folder)
        if text:
            command = command_of(record.folder) or ""
            shown = f"<p><code>{said(command)}</code></p><pre>{lines_of(text)}</pre>"
            parts.append(folded(said(name), shown))
    return "\n".join(parts)


def beside(runs: Sequence[Compared]) -> str:
    """Settings that differ, then final metrics, a column for each run; of a sweep a line for each,
    with both.
    """
    columns = [said(each.name) for each in runs]
    differ = [[said(key), *(setting(each, key) for each in runs)] for key in differing(runs)]
    names = [each for each in figure_names(runs) if not each.endswith(ENDS)]
    ended = [
        [
            said(name),
            *(with_error(*each.figures[name]) if name in each.figures else None for each in runs),
        ]
        for name in names
    ]
    if len(runs) > MOST_COLUMNS:
        ((_, *heads), *lines) = zip(["run", *columns], *differ, *ended, strict=True)
        title = "settings that differ, final metrics ± standard error"
        return table(["run", *map(str, heads)], lines, title)
    told = "<p>No setting differs.</p>"
    if differ:
        told = table(["setting", *columns], differ, "settings that differ")
    return told + table(["metric", *columns], ended, "final metrics, ± standard error")


def setting(run: Compared, key: str) -> str | None:
    """A value as a command would give it."""
    return said(written(run.settings[key])) if key in run.settings else None


def lines_of(text: str) -> str:
    """A text of several lines as HTML."""
    return "\n".join(map(said, text.splitlines()))
