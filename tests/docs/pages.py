"""README.md and docs/ as the tests of this folder read them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]

SPAN = re.compile(r"`((?:rlhf-cli|make) [^`]+)`")  # a command in a sentence
LEFT_OUT = ("...", "STAGE", "WORDS")  # a span with one of these names no whole command

# Bash reads the blocks, so variables, arrays, quotes and continued lines mean what they mean to a
# user. Nothing is run: there is no PATH, and the commands are functions that note their words.
PRELUDE = """
PATH=
note() { printf '%s\\0' "${BASH_LINENO[1]}" "$@" >> "$NOTES"; printf '\\0\\0' >> "$NOTES"; }
rlhf-cli() { note rlhf-cli "$@"; echo DIR; }
make() { note make "$@"; }
"""


@dataclass
class Command:
    """A command of a page: where it stands, and its words, the name of the tool first."""

    place: str
    words: list[str]


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(number of the first line, text) of the fenced blocks in one of these languages."""
    found: list[tuple[int, list[str]]] = []
    fence = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fence = "" if fence else line[3:].strip() or "text"
            if fence in languages:
                found.append((number + 1, []))
        elif fence in languages:
            found[-1][1].append(line)
    return [(number, "\n".join(lines)) for number, lines in found]


def prose(page: Path) -> list[str]:
    """The lines of a page, empty in place of those of fenced blocks."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    return lines


def commands(page: Path, folder: Path) -> list[Command]:
    """Every `rlhf-cli` and `make` command of the sh blocks and sentences of a page.

    Args:
        folder: an empty one, where the blocks are read.
    """
    script = [
        "; ".join(span for span in SPAN.findall(line) if not any(w in span for w in LEFT_OUT))
        for line in prose(page)
    ]
    for first, text in blocks(page, "sh"):
        for i, line in enumerate(text.splitlines()):
            script[first - 1 + i] = line
    (folder / "prelude").write_text(PRELUDE)
    (folder / "script").write_text("\n".join(script) + "\n")
    notes = folder / "notes"
    notes.touch()
    done = subprocess.run(
        ["bash", "script"],
        cwd=folder,
        env={"BASH_ENV": "prelude", "NOTES": str(notes), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "syntax error" not in done.stderr and "unexpected" not in done.stderr, done.stderr
    entries = [entry.split("\0") for entry in notes.read_text().split("\0\0\0") if entry]
    return [Command(f"{page.name}:{line}", words) for line, *words in entries]


def anchors(page: Path) -> set[str]:
    """The names that links to the headings of a page have on GitHub."""
    heads = [line.lstrip("#").strip() for line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[str]:
    """Targets of links and pictures within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))
    return [target for target in targets if "://" not in target]
