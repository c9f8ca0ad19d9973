"""The text of `rlhf-cli --help` and `rlhf-cli STAGE --help`, made from the schema and conf/."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.own_config import OwnConfig
from rlhf_cli.config.stages import STAGES, rows_with
from rlhf_cli.config.switches import used_by

_OVERVIEW = """\
rlhf-cli: align a language model with feedback, one stage per command.

Stages
{stages}

Commands
  data STAGE ...    what a stage will see of its rows: counts, lengths, tokens in colour
  export DIR DEST   a finished model for other tools: merged, cast, sharded, with a model card
  slurm STAGE ...   the stage as a job of SLURM, which is queued again until it is done
  ls [GROUP]        options of the groups algo, model, data, hardware, and recipes
  ls runs [FOLDER]  what was made from what: a tree of runs, with state, time and main metric
  cp NAME DEST      copy a shipped recipe or option, to change it
  env               versions and devices, for a bug report
  completion SHELL  completion script for bash, zsh or fish

Examples
  rlhf-cli sft && rlhf-cli reward && rlhf-cli ppo algo=ppo_ptx && rlhf-cli evaluate
  rlhf-cli dpo data=rows data.path=pairs.jsonl policy=my-model algo.beta=0.2
  rlhf-cli ppo --check algo.kl_coef=0.1     what would run, without running it
  rlhf-cli ppo --cfg job                    the composed config
  rlhf-cli ppo -m algo.kl_coef=0.02,0.1     a sweep

rlhf-cli STAGE --help lists every key of a stage."""

_FLAGS = (
    ("--check", "check config, paths and inputs, print what would run, and stop"),
    ("--cfg job", "print the composed config; -p GROUP for a part, --resolve to fill in ${...}"),
    ("-m", "sweep: KEY=A,B runs one job per value, in out/KEY=A, out/KEY=B"),
    ("--config FILE", "a config of your own, whole or in part, as --cfg job prints it"),
    ("--config-dir DIR", "options of your own: DIR/algo/mine.yaml, then algo=mine"),
)

MAX_TAKES = 60  # characters of what a key takes, in its column


def overview() -> str:
    """The help of the whole tool."""
    return _OVERVIEW.format(
        stages=columns([(name, stage.sentence) for name, stage in STAGES.items()])
    )


def stage_help(
    stage: str, overrides: list[str], dirs: list[Path], own: OwnConfig | None = None
) -> str:
    """The help of a stage: groups with their options, then every key with value and meaning.

    Options among the overrides are followed, so `ppo algo=ppo_ptx --help` shows its values, and so
    is a config of one's own.
    """
    words = dict(word.lstrip("+").split("=", 1) for word in overrides)
    chosen = catalog.default_options(stage)
    chosen |= own.options if own else {}
    chosen |= {group: words[group].split(",")[0] for group in chosen if group in words}
    values = catalog.stage_values(stage, chosen, dirs) | (own.values if own else {}) | words
    groups = [
        (f"{group}={option}", ", ".join(_fitting(stage, group, dirs)))
        for group, option in chosen.items()
    ]
    parts = [
        f"rlhf-cli {stage}: {STAGES[stage].sentence}\n{_reads_and_writes(stage, values)}",
        f"Usage: rlhf-cli {stage} [GROUP=OPTION ...] [KEY=VALUE ...] [FLAG ...]",
        "Flags\n" + columns(list(_FLAGS)),
        "Groups, as chosen now, and the options of each\n" + columns(groups),
    ]
    for group in ("", *catalog.GROUPS):
        title = f"{group}={chosen[group]}" if group else "Keys, as they are now"
        parts.append(title + "\n" + _key_table(stage, group, values))
    return "\n\n".join(parts)


def _reads_and_writes(stage: str, values: dict[str, Any]) -> str:
    """What a stage is made from and what it makes, in one line; the loss chooses the rows."""
    facts, models = STAGES[stage], ", ".join(catalog.model_keys(stage))
    rows = rows_with(facts, values.get("algo.loss"))
    return f"Reads {rows} rows and the models of {models}; writes a folder of kind {facts.writes}."


def _fitting(stage: str, group: str, dirs: list[Path]) -> list[str]:
    names = catalog.options(group, dirs)
    return [name for name in names if stage in catalog.stages_of(group, name, dirs)]


def _key_table(stage: str, group: str, values: dict[str, Any]) -> str:
    rows = []
    for key, field in catalog.keys(stage).items():
        if key.rpartition(".")[0] == group:
            takes, meaning = catalog.describe(stage, key), field.metadata["meaning"]
            if switch := used_by(stage, key):
                meaning += f" Used by {switch}."
            if len(takes) > MAX_TAKES:  # many names are read better as a sentence
                names = takes.removeprefix("list of ")
                takes = takes.removesuffix(names) + "names"
                meaning += f" Names: {names.replace('|', ', ')}."
            rows.append((f"{key}={shown(values.get(key, '???'))}", takes, meaning))
    return columns(rows)


def shown(value: Any) -> str:
    """A YAML value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return json.dumps(value) if "\n" in value else str(value)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns as wide as the terminal; the last column is wrapped, wide cells stick out."""
    total = min(shutil.get_terminal_size((100, 24)).columns, 140)
    count = len(rows[0]) - 1
    widths = [min(max(len(row[i]) for row in rows), total // 3) + 2 for i in range(count)]
    indent = 2 + sum(widths)
    if total - indent < 24:  # too narrow for columns: the last one goes below the others
        indent = 6
    lines = []
    for row in rows:
        head = "  " + "".join(
            f"{cell}  ".ljust(width) for cell, width in zip(row, widths, strict=False)
        )
        text = textwrap.wrap(row[-1], max(total - indent, 24)) or [""]
        if len(head.rstrip()) + 2 > indent:
            lines.append(head.rstrip())
        else:
            lines.append(head.ljust(indent) + text.pop(0))
        lines += [" " * indent + each for each in text]
    return "\n".join(line.rstrip() for line in lines)
