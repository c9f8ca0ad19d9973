"""`rlhf-cli completion bash|zsh|fish`: the script that a shell evaluates.

The scripts ask `rlhf-cli completion query`, which reads the line up to the cursor from COMP_LINE
and COMP_POINT, as bash sets them, and prints one candidate per line. A candidate that ends a word
ends in a space; one that still needs a value ends in `=`.
"""

import os
from pathlib import Path

from rlhf_cli.commands import COMMANDS, SHORT, report, slurm
from rlhf_cli.commands.export import KEYS
from rlhf_cli.commands.help import ALL
from rlhf_cli.commands.ls import NAMES
from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.stages import STAGES
from rlhf_cli.reporting.terminal import on_one_line

USAGE = """\
rlhf-cli completion: the completion script of a shell.

Usage: source <(rlhf-cli completion bash), or zsh; rlhf-cli completion fish | source"""

_BASH = """\
# eval "$(rlhf-cli completion bash)"
_rlhf_cli() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" rlhf-cli completion query))
    # bash cuts words at "=" and replaces only what follows it.
    if [[ "$COMP_WORDBREAKS" == *=* && "${line##* }" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#*=}")
    fi
}
complete -o nospace -o default -F _rlhf_cli rlhf-cli
"""

_ZSH = """\
# eval "$(rlhf-cli completion zsh)"
_rlhf_cli() {
    local line="${(j: :)words[1,CURRENT]}"
    local -a found=("${(@f)$(COMP_LINE="$line" COMP_POINT="${#line}" rlhf-cli completion query)}")
    if [[ -n "$found" ]]; then compadd -S '' -- "${found[@]}"; else _files -P "${PREFIX%%=*}="; fi
}
compdef _rlhf_cli rlhf-cli
"""

_FISH = """\
# rlhf-cli completion fish | source
function __rlhf_cli
    set -l line (commandline -cp)
    COMP_LINE="$line" COMP_POINT=(string length -- "$line") rlhf-cli completion query
end
complete -c rlhf-cli -a '(__rlhf_cli)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
PLACES = 2  # folders that export takes
_FLAGS = ("--help", "--check", "--json", "--cfg", "--config", "--config-dir", "--multirun")


def run(words: list[str]) -> None:
    """Print the script of a shell, or with `query` the candidates for a line.

    Raises:
        UserError: another word than a shell's name.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    if words == ["query"]:
        line = os.environ.get("COMP_LINE", "")
        point = int(os.environ.get("COMP_POINT", len(line)))
        print("\n".join(candidates(line[:point])))
    elif len(words) == 1 and words[0] in _SCRIPTS:
        print(_SCRIPTS[words[0]], end="")
    else:
        raise UserError("completion takes a shell: rlhf-cli completion bash, zsh or fish")


def candidates(line: str) -> list[str]:
    """What the last word of a line may become; a line that ends in a space starts a new word."""
    words = line.split()[1:]
    word = words.pop() if words and not line.endswith(" ") else ""
    if not words:
        names = [f"{name} " for name in (*STAGES, *COMMANDS)]
    elif words[0] in STAGES:
        names = _stage_words(words, word)
    else:
        names = _command_words(words, word)
    # a shell shows them; a file whose name holds controls is no option to offer
    return sorted(name for name in names if name.startswith(word) and on_one_line(name) == name)


def _stage_words(words: list[str], word: str) -> list[str]:
    stage = words[0]
    dirs = catalog.config_dirs(_config_dir(words))
    if words[-1] in ("--config", "--config-dir", "-cd"):
        return []  # a file or folder, which shells complete themselves
    if word.startswith("-"):
        return [f"{flag} " for flag in _FLAGS]
    if words[-1] in ("--help", "-h"):
        return [f"{name} " for name in (ALL, *catalog.GROUPS, *catalog.keys(stage))]
    key, equals, _ = word.partition("=")
    if not equals:
        return [f"{name}=" for name in (*catalog.GROUPS, *catalog.keys(stage))]
    if key in catalog.GROUPS:
        fitting = (
            name
            for name in catalog.options(key, dirs)
            if not (owners := catalog.stages_of(key, name, dirs)) or stage in owners
        )
        return [f"{key}={name} " for name in fitting]
    if key == "model.size":
        return [f"{key}={size} " for size in _sizes(words, dirs)]
    field = catalog.keys(stage).get(key)
    choices = catalog.choices(stage, key) if field else ()
    if field and field.type is bool:
        choices = ("true", "false")
    return [f"{key}={choice} " for choice in choices]


def _sizes(words: list[str], dirs: list[Path]) -> list[str]:
    """Those of the family that the line asks for."""
    options = [word.partition("=")[2] for word in words if word.startswith("model=")]
    return [
        str(size)
        for option in options
        for size in catalog.option_values("model", option, dirs).get("sizes") or {}
    ]


def _command_words(words: list[str], word: str) -> list[str]:
    command, *more = words
    if SHORT.get(command, command) == "export":
        key, equals, _ = word.partition("=")
        if len([each for each in more if "=" not in each]) < PLACES:
            return []  # DIR and DEST, which shells complete themselves
        if not equals:
            return [f"{name}=" for name in KEYS]
        return [f"{key}={value} " for value in KEYS[key].words] if key in KEYS else []
    if command == "slurm":
        if not more:
            return [f"{stage} " for stage in STAGES]
        if more[0] not in STAGES:
            return []
        return slurm.flags() if word.startswith("-") else _stage_words(more, word)
    if command == "report":
        if word.startswith("pictures="):
            return [f"pictures={kind} " for kind in report.KINDS]
        return [f"{key}=" for key in report.KEYS]
    if command == "ls":  # what follows `ls runs` are folders, which shells complete themselves
        return [] if more else [f"{name} " for name in NAMES]
    if command == "completion":
        return [f"{shell} " for shell in _SCRIPTS]
    if command == "cp":
        recipes = [f"{file.name} " for file in catalog.shipped("recipes").glob("*.*")]
        dirs = catalog.config_dirs()
        return recipes + [
            f"{group}/{name} " for group in catalog.GROUPS for name in catalog.options(group, dirs)
        ]
    return []


def _config_dir(words: list[str]) -> str | None:
    for flag, value in zip(words, words[1:], strict=False):
        if flag in ("--config-dir", "-cd"):
            return value
    return None
