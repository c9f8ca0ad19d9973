"""`rlhf-cli data STAGE ...`: what a stage will see of its rows, without training."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.stages import STAGES

if TYPE_CHECKING:
    from rich.text import Text

    from rlhf_cli.data.dataset import Dataset
    from rlhf_cli.data.survey import Side, Survey
    from rlhf_cli.data.tokens import Encoder

BINS = 12  # of a histogram
WIDEST = 40  # characters of a bar
SHOWN = 3  # rows, unless --rows says otherwise
# How tokens are shown: what is given, what carries loss, and what of a response carries none.
STYLES = {"prompt": "dim", "carries loss": "green", "no loss": "yellow"}
SPECIAL = "underline"  # beside that
OPEN, CLOSE = "⟦", "⟧"  # around what carries loss, where there are no colours


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"data: {message}; see rlhf-cli data --help")


def run(words: list[str]) -> None:
    """Print counts, lengths, duplicates and a few rows; JSON with --json.

    Raises:
        UserError: the command, config or a row is wrong.
    """
    flags, overrides = parse(words)
    seen = looked_at(flags.stage, overrides, flags.config_dir, flags.config)
    if flags.plot is not None:
        from rlhf_cli.reporting.plots import lengths_picture

        lengths_picture(flags.plot, lengths_of(seen.survey.train))
    if flags.json:
        print(json.dumps({**figures(seen), "rows": list(rows_as_json(seen, flags.rows))}))
    else:
        show(seen, flags.rows)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the command, and the overrides of the stage.

    Raises:
        UserError: there is no such stage or flag.
    """
    usage = "rlhf-cli data STAGE [GROUP=OPTION ...] [KEY=VALUE ...] [FLAG ...]"
    parser = _Parser(prog="rlhf-cli data", description=__doc__, usage=usage, allow_abbrev=False)
    parser.add_argument("stage", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--json", action="store_true", help="print figures and rows as JSON")
    parser.add_argument("--rows", type=int, default=SHOWN, help="rows to show (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the lengths")
    parser.add_argument("--config-dir", "-cd", help="options of your own, as for a stage")
    parser.add_argument("--config", help="a config of your own, as for a stage")
    flags, overrides = parser.parse_known_args(words)
    if wrong := next((word for word in overrides if word.startswith("-")), None):
        raise UserError(f"data: unknown flag {wrong}; see rlhf-cli data --help")
    if flags.stage not in STAGES:
        hint = nearest(flags.stage, list(STAGES)) or f"; stages are {', '.join(STAGES)}"
        raise UserError(f"data: unknown stage {flags.stage}{hint}")
    if flags.rows < 0:
        raise UserError(f"data: --rows={flags.rows}: expected 0 or more")
    if flags.plot is not None and not flags.plot.parent.is_dir():
        raise UserError(f"data: --plot={flags.plot}: no folder {flags.plot.parent}")
    return flags, overrides


@dataclass
class Seen:
    """What a stage will see."""

    stage: str
    data: "Dataset"
    survey: "Survey"
    encoder: "Encoder"


def looked_at(
    stage: str, overrides: list[str], config_dir: str | None, config_file: str | None
) -> Seen:
    """Read and tokenise the rows of a stage as it would itself."""
    from rlhf_cli.config import catalog
    from rlhf_cli.config.compose import compose
    from rlhf_cli.config.hints import check_overrides

    check_overrides(stage, overrides, catalog.config_dirs(config_dir))
    cfg = compose(stage, overrides, config_dir, config_file)
    from rlhf_cli.data.dataset import dataset_of
    from rlhf_cli.data.kinds import row_kind
    from rlhf_cli.data.look import expected_rows
    from rlhf_cli.data.rows import Rows
    from rlhf_cli.data.survey import surveyed
    from rlhf_cli.reporting.console import Bar
    from rlhf_cli.runs.data_checks import check_data
    from rlhf_cli.runs.inherited import inherit
    from rlhf_cli.runs.model_checks import check_models

    inherit(cfg)
    check_data(cfg)
    check_models(cfg)
    kind, rows = row_kind(cfg), Rows(cfg.data)
    from rlhf_cli.runs.encoders import encoder_of  # takes seconds

    encoder = encoder_of(cfg, rows)
    places = rows.places(kind)
    with Bar("rows", expected_rows(places)) as bar:
        data = dataset_of(places, kind, cfg.data, encoder, bar.advance)
    return Seen(stage, data, surveyed(data), encoder)


# --------------------------------------------------------------------------- figures


def figures(seen: Seen) -> dict[str, Any]:
    """Everything that is counted, as JSON has it."""
    survey = seen.survey
    return {
        "stage": seen.stage,
        "notes": seen.data.notes,
        "train": side_figures(survey.train),
        "held_out": side_figures(survey.held_out),
    }


def side_figures(side: "Side") -> dict[str, Any]:
    """One side of the split."""
    return {
        "items": side.items,
        "repeated": side.repeated,
        "tokens_with_loss": side.learnt,
        "sources": dict(side.sources),
        **{name: quantiles(lengths) for name, lengths in lengths_of(side).items()},
    }


def lengths_of(side: "Side") -> dict[str, list[int]]:
    """Tokens of prompts and, where there are any, of responses."""
    found = {"prompt_tokens": side.prompts, "response_tokens": side.responses}
    return {name: lengths for name, lengths in found.items() if lengths}


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Least, median, 95th of a hundred, greatest and sum."""
    ordered = sorted(values)
    at = [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.0, 0.5, 0.95, 1.0)]
    return dict(zip(("min", "median", "p95", "max"), at, strict=True)) | {"sum": sum(ordered)}


# --------------------------------------------------------------------------- for people


def show(seen: Seen, rows: int) -> None:
    """Print figures, histograms and rows."""
    from rich.console import Console
    from rich.text import Text

    from rlhf_cli.reporting.console import seen as fit

    out = Console(highlight=False, soft_wrap=True, emoji=False)
    for line in seen.data.notes:
        out.print(fit(line))
    for name, side in (("to learn from", seen.survey.train), ("held out", seen.survey.held_out)):
        out.print(f"{side.items} {name}, {side.repeated} of them repeat an earlier one")
        for source, count in side.sources.items():
            out.print(fit(f"  {source}: {count}"))
    for name, lengths in lengths_of(seen.survey.train).items():
        told = ", ".join(f"{key} {value}" for key, value in quantiles(lengths).items())
        out.print(f"\n{name.replace('_', ' ')}: {told}")
        for line in histogram(lengths):
            out.print(line)
    coloured = out.color_system is not None
    legend = Text()
    for name, style in STYLES.items():
        legend.append(f"{name}  ", style)
    legend.append("special token", SPECIAL)
    if not coloured:
        legend = Text(f"{OPEN}carries loss{CLOSE}")
    for item in seen.data.train[:rows]:
        out.print()
        out.print(legend)
        for text in texts_of(item, seen.encoder, coloured):
            out.print(text)


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Lines with a bar for each range of lengths."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    digits = len(str(high))
    for i, count in enumerate(counts):
        start = low + i * width
        bar = "█" * round(WIDEST * count / max(counts)) or ("▏" if count else "")
        yield f"{start:>{digits}} to {min(start + width - 1, high):>{digits}} {bar} {count}"


def texts_of(item: Any, encoder: "Encoder", coloured: bool) -> "Iterator[Text]":
    """An item as text: its prompt, and each response; in colour, or with marks."""
    from rich.text import Text

    from rlhf_cli.reporting.terminal import printable

    for label, pieces in pieces_of(item, encoder):
        text = Text(f"{label}: ", "bold")
        for piece in pieces:
            if not coloured:
                marked = piece.what == "carries loss"
                text.append(
                    f"{OPEN}{printable(piece.text)}{CLOSE}" if marked else printable(piece.text)
                )
                continue
            style = STYLES[piece.what]
            text.append(printable(piece.text), f"{style} {SPECIAL}" if piece.special else style)
        yield text


@dataclass
class Piece:
    """A part of a text: a key of STYLES, and whether it is special tokens."""

    text: str
    what: str
    special: bool


def pieces_of(item: Any, encoder: "Encoder") -> Iterator[tuple[str, list[Piece]]]:
    """What an item is made of: a label, and its text in pieces."""
    from rlhf_cli.data.items import Tokens
    from rlhf_cli.data.store import parts_of

    prompt, responses = parts_of(item)
    source = item[0].source if isinstance(item, tuple) else item.source
    yield f"{source} prompt", cut(prompt, ["prompt"] * len(prompt), encoder)
    for number, response in enumerate(responses):
        loss = item.loss if isinstance(item, Tokens) and item.loss else [True] * len(response)
        whats = ["carries loss" if learnt else "no loss" for learnt in loss]
        yield f"response {number + 1}", cut(response, whats, encoder)


def cut(ids: Sequence[int], whats: Sequence[str], encoder: "Encoder") -> list[Piece]:
    """The text of tokens, in pieces that are alike."""
    special = set(encoder.tokenizer.all_special_ids) | encoder.ids.special_ids
    alike = groupby(zip(ids, whats, strict=True), lambda each: (each[1], each[0] in special))
    decode = encoder.tokenizer.decode
    return [
        Piece(str(decode([id for id, _ in group], skip_special_tokens=False)), *key)
        for key, group in alike
    ]


def rows_as_json(seen: Seen, rows: int) -> Iterator[dict[str, Any]]:
    """The first rows: their texts, what each part of them is, and whether it is special tokens."""
    for item in seen.data.train[:rows]:
        yield {
            label: [
                {"text": piece.text, "is": piece.what, "special": piece.special} for piece in pieces
            ]
            for label, pieces in pieces_of(item, seen.encoder)
        }
