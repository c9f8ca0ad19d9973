"""One HTML file that asks for nothing: parts of page/ put together with what is to be shown.

Scripts are known to the page by their hash, so no other one can run in it, and its policy allows no
request. What others wrote, such as rows and responses, is handed over as JSON, and as text only.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from rlhf_cli.config.secrets import redacted, redacted_within
from rlhf_cli.reporting.grid import with_error
from rlhf_cli.reporting.plots import DARK, LIGHT, numbers
from rlhf_cli.reporting.terminal import on_one_line

PAGE = "page"
TEMPLATE = "page.html"
STYLES = ("page.css", "samples.css")
SCRIPTS = ("page.js", "charts.js", "texts.js", "tokens.js", "samples.js")
"""Files of page/ in every page, in this order: a script sees what earlier ones name."""

MADE_BY = "rlhf-cli report"
POLICY_START = 2000  # characters in which a page says that it was made here
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass
class Section:
    """A part of a page.

    name: of its element, and of what `data` has for it.
    body: HTML; whatever comes from runs is escaped in it.
    """

    name: str
    title: str
    body: str = ""


def said(text: object) -> str:
    """A text of a run as HTML: escaped, controls shown, secrets hidden."""
    return html.escape(on_one_line(redacted(str(text))))


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    caption: str = "",
    look: str = "",
) -> str:
    """A table that scrolls where it is wider than the page; cells, heads and caption are HTML.

    Args:
        look: its class in page.css, if it has a look of its own.
    """
    above = f"<caption>{caption}</caption>" if caption else ""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    start = f'<table class="{look}">' if look else "<table>"
    inside = f"{start}{above}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    label = caption or f"table by {heads[0]}"
    return f'<div class="wide" tabindex="0" role="group" aria-label="{label}">{inside}</div>'


def _cells(row: Sequence[str | None]) -> str:
    first, *rest = row
    cells = "".join(f"<td>{'–' if each is None else each}</td>" for each in rest)
    return f'<th scope="row">{first}</th>{cells}'


def listed(names: Iterable[str]) -> str:
    """Names one after the other, as HTML."""
    return ", ".join(map(said, names))


def cell(figures: object, key: str, form: str) -> str | None:
    """A number of a table; None where it is not known."""
    known = numbers(figures, key)
    return format(known[0], form) if known else None


def with_stderr(figures: object, key: str, stderr: str) -> str | None:
    """A number with its standard error, under the names of both; None where it is not known."""
    known, error = numbers(figures, key), numbers(figures, stderr)
    return with_error(known[0], error[0] if error else None) if known else None


def remark(text: str) -> str:
    """What is said in small beneath a table or a figure, as HTML; nothing of an empty text."""
    return text and f'<p class="note">{text}</p>'


def folded(summary: str, body: str) -> str:
    """A part that is opened by whoever wants it."""
    return f"<details><summary>{summary}</summary>\n{body}</details>"


def page(title: str, sections: Sequence[Section], data: Mapping[str, Any], library: str) -> str:
    """The whole file.

    Args:
        data: what scripts read by `JSON.parse` of the element `data`.
        library: JavaScript that draws; scripts of page/ come after it.
    """
    scripts = [script(each) for each in (library, *map(part, SCRIPTS))]
    allowed = " ".join(f"'{hashed(each)}'" for each in scripts)
    return Template(part(TEMPLATE)).substitute(
        made_by=MADE_BY,
        policy=POLICY.format(scripts=allowed),
        title=html.escape(title),
        style="\n".join([colours(), *map(part, STYLES)]),
        links="\n".join(f'<a href="#{each.name}">{each.title}</a>' for each in sections),
        sections="\n".join(map(section, sections)),
        data=as_json(data),
        scripts="\n".join(f"<script>{each}</script>" for each in scripts),
    )


def colours() -> str:
    """The colours of pages and of what is drawn in them, light and dark, as custom properties."""
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in each.items()) for each in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def section(each: Section) -> str:
    """Its element, under a heading."""
    head = f'<h2 id="{each.name}-title">{each.title}</h2>'
    start = f'<section id="{each.name}" aria-labelledby="{each.name}-title">'
    return f"{start}{head}\n{each.body}</section>"


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that no HTML is seen in, whatever texts it holds; halves of characters are escaped."""
    text = json.dumps(redacted_within(data), separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def part(name: str) -> str:
    """A file of page/."""
    return (resources.files("rlhf_cli.views") / PAGE / name).read_text(encoding="utf-8")


def script(text: str) -> str:
    """A script as a browser reads it, which ends it at `</script`, wherever that stands."""
    return text.replace("\r\n", "\n").replace("</script", r"<\/script").replace("<!--", r"<\!--")


def hashed(text: str) -> str:
    """A script's hash as a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
