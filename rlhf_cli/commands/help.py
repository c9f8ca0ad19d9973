"""The text of `rlhf-cli --help` and `rlhf-cli STAGE --help`, made from the schema and conf/.

The help of a stage is what people change; `--help all` is all of it, `--help KEY` one key or group.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.config.own_config import OwnConfig
from rlhf_cli.config.stages import STAGES, rows_with
from rlhf_cli.config.switches import used_by
from rlhf_cli.reporting.terminal import width

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
  watch RUN         how far a run is, or the runs in a folder, from another terminal
  compare RUN ...   settings that differ and final metrics side by side; a sweep as table or CSV
  rounds EVAL ...   what each round of labels has gained; which policy the next one labels
  report RUN ...    runs as one HTML file: lineage, curves, comparisons, samples
  chat POLICY ...   talk to a policy, or to two side by side; reads from a pipe too
  cp NAME DEST      copy a shipped recipe or option, to change it
  env               versions and devices, for a bug report
  completion SHELL  completion script for bash, zsh or fish

Examples
  rlhf-cli sft && rlhf-cli reward && rlhf-cli ppo algo=ppo_ptx && rlhf-cli evaluate
  rlhf-cli dpo data=rows data.path=pairs.jsonl policy=my-model algo.beta=0.2
  rlhf-cli ppo --check algo.kl_coef=0.1     what would run, without running it
  rlhf-cli ppo --cfg job                    the composed config
  rlhf-cli ppo -m algo.kl_coef=0.02,0.1     a sweep

Environment
  RLHF_TRACEBACK=1  a traceback in place of the line that an error is
  COLUMNS=120       how wide help and tables are; else as wide as the terminal, 100 in a pipe
  NO_COLOR=1        no colours, HF_HUB_OFFLINE=1 no network, CI=1 plain lines on a terminal too

rlhf-cli STAGE --help shows what people change of a stage, --help all every key, --help KEY one."""

_FLAGS = (
    ("--help all|KEY", "every key; or one key or group, as in --help algo.lr or --help data"),
    ("--check", "check config, paths and inputs, print what would run, and stop; --json for a CI"),
    ("--cfg job", "print the composed config; -p GROUP for a part, --resolve to fill in ${...}"),
    ("-m", "sweep: KEY=A,B runs one job per value, in out/KEY=A, out/KEY=B"),
    ("--config FILE", "a config of your own, whole or in part, as --cfg job prints it"),
    ("--config-dir DIR", "options of your own: DIR/algo/mine.yaml, then algo=mine"),
)

MAX_TAKES = 60  # characters of what a key takes, in its column
ALL = "all"
CHANGED = (
    *("name", "out", "seed", "policy", "reference", "reward", "gold", "baselines"),
    *("source", "annotators", "who", "algo.protocol"),
    *("model.path", "model.lora_rank", "data.path", "data.template"),
    *("data.max_prompt_tokens", "data.max_response_tokens"),
    *("algo.lr", "algo.epochs", "algo.steps", "algo.batch_size", "algo.group_size"),
    *("algo.kl_coef", "algo.beta", "algo.prompts", "algo.samples"),
    *("algo.max_tokens", "algo.temperature", "hardware.device", "hardware.tokens_per_microbatch"),
)
"""The keys that people change, of all stages; the rest is in `--help all`."""


def overview() -> str:
    """The help of the whole tool."""
    return _OVERVIEW.format(
        stages=columns([(name, stage.sentence) for name, stage in STAGES.items()])
    )


def stage_help(
    stage: str,
    overrides: list[str],
    dirs: list[Path],
    own: OwnConfig | None = None,
    about: str = "",
) -> str:
    """The help of a stage: groups with their options, then keys with value and meaning.

    Options among the overrides are followed, so `ppo algo=ppo_ptx --help` shows its values, and so
    is a config of one's own.

    Args:
        about: nothing for the keys that people change; `all`; or a key, its last word, or a group.

    Raises:
        UserError: there is no such key.
    """
    words = dict(word.lstrip("+").split("=", 1) for word in overrides)
    chosen = catalog.default_options(stage)
    chosen |= own.options if own else {}
    chosen |= {group: words[group].split(",")[0] for group in chosen if group in words}
    values = catalog.stage_values(stage, chosen, dirs) | (own.values if own else {}) | words
    if about not in ("", ALL):
        return _about(stage, about, values)
    groups = [
        (f"{group}={option}", ", ".join(_fitting(stage, group, dirs)))
        for group, option in chosen.items()
    ]
    about_it = (f"rlhf-cli {stage}: {STAGES[stage].sentence}", _reads_and_writes(stage, values))
    parts = [
        "\n".join(textwrap.fill(line, _total()) for line in about_it),
        textwrap.fill(
            f"Usage: rlhf-cli {stage} [GROUP=OPTION ...] [KEY=VALUE ...] [FLAG ...]", _total()
        ),
        "Flags\n" + columns(list(_FLAGS)),
        "Groups, as chosen now, and the options of each\n" + columns(groups),
    ]
    keys = list(catalog.keys(stage))
    if not about:
        common = [key for key in CHANGED if key in keys]
        rest = f"{len(keys) - len(common)} more keys, and all of each: rlhf-cli {stage} --help all"
        table = columns([(_given(key, values), _in_short(stage, key)) for key in common])
        return "\n\n".join([*parts, f"What people change, as it is now\n{table}", rest])
    for group in ("", *catalog.GROUPS):
        title = f"{group}={chosen[group]}" if group else "Keys, as they are now"
        table = _key_table(stage, _keys_in(stage, group), values)
        parts.append(f"{title}\n{table}")
    return "\n\n".join(parts)


def _about(stage: str, word: str, values: dict[str, Any]) -> str:
    """The help of a group, or of the keys that a word names; of one key, its values in options."""
    if word in catalog.GROUPS:
        return _key_table(stage, _keys_in(stage, word), values)
    keys = list(catalog.keys(stage))
    named = [word] if word in keys else [key for key in keys if key.rpartition(".")[2] == word]
    if not named:
        hint = nearest(word, [*catalog.GROUPS, *keys, *(key.rpartition(".")[2] for key in keys)])
        choices = f"; it takes {ALL}, {', '.join(catalog.GROUPS)}, or a key"
        raise UserError(f"--help: {stage} has no key {word}{hint or choices}")
    lines = [_key_table(stage, named, values)]
    for key in named:
        group = catalog.group_of(key)
        of_options = catalog.shipped_options(stage, group) if group else {}
        told = [
            (f"{group}={name}", f"{key}={shown(each[key])}") for name, each in of_options.items()
        ]
        if len({value for _, value in told}) > 1:
            lines.append(f"What options of {group} say\n{columns(sorted(told))}")
    return "\n\n".join(lines)


def _keys_in(stage: str, group: str) -> list[str]:
    return [key for key in catalog.keys(stage) if catalog.group_of(key) == group]


def _reads_and_writes(stage: str, values: dict[str, Any]) -> str:
    """What a stage is made from and what it makes, in one line; the loss chooses the rows."""
    facts, models = STAGES[stage], ", ".join(catalog.model_keys(stage))
    rows = rows_with(facts, values.get("algo.loss"))
    return f"Reads {rows} rows and the models of {models}; writes a folder of kind {facts.writes}."


def _fitting(stage: str, group: str, dirs: list[Path]) -> list[str]:
    names = catalog.options(group, dirs)
    return [name for name in names if stage in catalog.stages_of(group, name, dirs)]


def _key_table(stage: str, keys: Sequence[str], values: dict[str, Any]) -> str:
    rows = []
    for key in keys:
        takes = catalog.describe(stage, key)
        meaning = catalog.keys(stage)[key].metadata["meaning"]
        if switch := used_by(stage, key):
            meaning += f" Used by {switch}."
        if len(takes) > MAX_TAKES:  # many names are read better as a sentence
            names = takes.removeprefix("list of ")
            takes = takes.removesuffix(names) + "names"
            meaning += f" Names: {names.replace('|', ', ')}."
        rows.append((_given(key, values), takes, meaning))
    return columns(rows)


def _given(key: str, values: dict[str, Any]) -> str:
    return f"{key}={shown(values.get(key, '???'))}"


def _in_short(stage: str, key: str) -> str:
    """The beginning of what a key means."""
    meaning: str = catalog.keys(stage)[key].metadata["meaning"]
    return re.split(r"[.;] ", meaning, maxsplit=1)[0].rstrip(".") + "."


def shown(value: Any) -> str:
    """A YAML value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return json.dumps(value) if "\n" in value else str(value)


def _total() -> int:
    return min(width(), 140)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns as wide as the terminal; the last column is wrapped, wide cells stick out."""
    total = _total()
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
            lines.append(head.rstrip().ljust(indent) + text.pop(0))
        lines += [" " * indent + each for each in text]
    return "\n".join(line.rstrip() for line in lines)
