"""From a wrong word to one line that says what, where, and the nearest valid name.

`check_overrides` looks at the words of a command before Hydra sees them. `explain` turns what
Hydra and OmegaConf raise afterwards into the same kind of line. Neither imports them.
"""

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.secrets import refuse_secrets
from rlhf_cli.config.stages import STAGES

_PLAIN_NAMES = re.compile(r"[\w./,-]*")

# What a sweep needs of Hydra's own: who runs its jobs, who chooses them, where they are noted down.
_SWEEP_CHOICES = re.compile(r"hydra/(?:launcher|sweeper|sweeper/sampler)")
_SWEEP_KEYS = re.compile(r"hydra\.(?:launcher|sweeper|sweep)(?:\.[a-zA-Z][\w-]*)+")
_CALLED = re.compile(r"_(?:target|args|recursive|convert|partial)_")  # Hydra calls what these name
# What may be filled in there: texts, as a map could name something to call.
_FILLED_IN = re.compile(r"\$\{(?:oc\.env:[^{}]*|name|out|seed|hydra[.:](?:job|sweep)\.[\w.]+)\}")

OWN_CONFIG = "own_config"  # the group as which Hydra knows the file of --config

# Names of before: a key, or an option or a value as KEY=VALUE, and what it is called now.
RENAMED = {
    "hardware.keep": "hardware.keep_checkpoints",
    "algo.refills": "algo.dynamic_sampling",
    "algo=steps": "algo=process",
    "algo.loss=steps": "algo.loss=process",
    "algo.whiten_rewards=True": "algo.whiten_rewards=scale",
    "algo.whiten_rewards=False": "algo.whiten_rewards=none",
    "data.convert=feedback_to_steps": "data.convert=feedback_to_stepwise",
}


def nearest(word: str, names: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """`; did you mean NAME?` for the closest of the names, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def renamed(stage: str, word: str) -> str | None:
    """The line for a KEY or a KEY=VALUE of before; None for other words."""
    if word not in RENAMED:
        return None
    key, _, option = RENAMED[word].partition("=")
    if key in catalog.GROUPS:
        owners = catalog.stages_of(key, option, catalog.config_dirs())
    else:
        owners = [other for other in STAGES if key in catalog.keys(other)]
    theirs = ", ".join(f"`rlhf-cli {owner}`" for owner in owners)
    belongs = "" if stage in owners else f", and belongs to {theirs}"
    return f"{word} is called {RENAMED[word]} now{belongs}"


def check_overrides(stage: str, overrides: list[str], dirs: list[Path]) -> None:
    """Check the names in `key=value` and `group=option` words; values are checked by `typed`.

    Raises:
        UserError: a word is not key=value, names no key, group or option of this stage, or holds a
            secret, which the first line of config.yaml would keep.
    """
    for override in overrides:
        if override.startswith("~"):
            raise UserError(f"{override}: a key cannot be removed; give it another value")
        key, equals, value = override.partition("=")
        if not key:
            raise UserError(f"{override} names no key; write KEY=VALUE")
        if not equals:
            raise UserError(f"{override} has no value; write {override}=VALUE, no spaces around =")
        key = key.lstrip("+")
        refuse_secrets({key: value})
        if key in catalog.GROUPS:
            if _PLAIN_NAMES.fullmatch(value.strip()):
                for option in value.split(","):
                    _check_option(stage, key, option.strip(), dirs)
        elif key.startswith(("hydra.", "hydra/")):
            _check_hydra(key, value)
        else:
            _check_key(stage, key)


def _check_option(stage: str, group: str, option: str, dirs: list[Path]) -> None:
    names = catalog.options(group, dirs)
    fitting = [name for name in names if stage in catalog.stages_of(group, name, dirs)]
    choices = f"{stage} takes {', '.join(fitting)}"
    if catalog.option_file(group, option, dirs) is None:
        hint = nearest(option, fitting) or nearest(option, names) or _as_path(stage, group, option)
        line = f"unknown {group} option {option}{hint or ';'} {choices}"
        raise UserError(renamed(stage, f"{group}={option}") or line)
    owners = catalog.stages_of(group, option, dirs)
    # An option with owners nowhere is a user's own file with a slip in it: composing names the key.
    if owners and stage not in owners:
        commands = ", ".join(f"`rlhf-cli {owner}`" for owner in owners)
        same = next((f"; did you mean {name}?" for name in fitting if option in name), ";")
        raise UserError(f"{group}={option} belongs to {commands}{same} {choices}")


def _as_path(stage: str, group: str, option: str) -> str:
    """The words for a folder or hub id where an option of `model` was asked for."""
    if group != "model" or "/" not in option:
        return ""
    starts = "model.path" in catalog.keys(stage)
    words = f"model=pretrained model.path={option}" if starts else f"policy={option}"
    return f"; a folder or hub id is {words};"


def _check_hydra(key: str, value: str) -> None:
    """Refuse settings of Hydra's that sweeps do not need, and any that would call something."""
    if _SWEEP_CHOICES.fullmatch(key) and re.fullmatch(r"[\w-]+", value):
        return
    if not _SWEEP_KEYS.fullmatch(key):
        raise UserError(
            f"{key}={value}: of Hydra's settings a command may give those of sweeps: "
            "hydra/launcher, hydra/sweeper and what is in hydra.launcher, hydra.sweeper and "
            "hydra.sweep"
        )
    within_params = key.startswith("hydra.sweeper.params") and "hydra" in key[6:] + value
    if _CALLED.search(value) or "${" in _FILLED_IN.sub("", value) or within_params:
        raise UserError(f"{key}={value}: a value cannot name what Hydra would call or look up")


def _check_key(stage: str, key: str) -> None:
    known = catalog.keys(stage)
    parent = key.rpartition(".")[0]
    if key not in known and not (parent in known and catalog.is_map(known[parent])):
        raise UserError(unknown_key(stage, key))


def unknown_key(stage: str, key: str) -> str:
    """The line for a key that a stage does not have."""
    if line := renamed(stage, key):
        return line
    known = catalog.keys(stage)
    group = key.rpartition(".")[0]
    inside = [each for each in known if each.rpartition(".")[2] == key]
    owners = [other for other in STAGES if key in catalog.keys(other)]
    if inside:
        hint = f"; did you mean {' or '.join(inside)}?"
    elif owners:
        hint = f"; it belongs to {', '.join(f'`rlhf-cli {owner}`' for owner in owners)}"
    else:
        hint = _nearest_key(key, known)
    if not hint and group in catalog.GROUPS:
        hint = f"; {group} has {', '.join(sorted(catalog.group_keys(stage, group)))}"
    return f"unknown key {key}{hint or f'; see rlhf-cli {stage} --help'}"


def _nearest_key(key: str, known: Iterable[str]) -> str:
    group, _, name = key.rpartition(".")
    siblings = [each.rpartition(".")[2] for each in known if each.rpartition(".")[0] == group]
    if not group:
        return nearest(name, [*siblings, *catalog.GROUPS])
    if siblings:  # compared without the group, which all of them share: all would look close
        return nearest(name, siblings, prefix=f"{group}.")
    return nearest(key, known)


def unknown_value(stage: str, key: str, value: object) -> str:
    """The line for a value that is none of the choices of a key."""
    known = catalog.choices(stage, key)
    for word in (f"{key}={value}", f"{key}={str(value).capitalize()}"):  # it was true or false
        if RENAMED.get(word, "").removeprefix(f"{key}=") in known:
            return str(renamed(stage, word))
    return wrong_value(stage, key, value) + nearest(str(value), known)


def wrong_value(stage: str, key: str, value: object) -> str:
    """The line for a value of the wrong type or out of bounds."""
    takes = catalog.describe(stage, key) if key in catalog.keys(stage) else "a group of keys"
    article = {"integer": "an ", "number": "a ", "list": "a ", "map": "a "}
    plain = takes.removeprefix(f"{AUTO} or ")
    takes = takes.removesuffix(plain) + article.get(plain.partition(" ")[0], "") + plain
    return f"{key} must be {takes}, got {'null' if value is None else value}"


def explain(error: BaseException, stage: str) -> str | None:
    """One line for an exception of Hydra or OmegaConf; None when it is not one of theirs."""
    if not {_library(type(error).__module__), _raised_in(error)} & {"hydra", "omegaconf"}:
        return None
    chain = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__
    text = "\n".join(str(each) for each in reversed(chain))  # the cause first, it is the exact one
    where = re.search(r"In '(\w+/[^']+)':", text)
    file = f" (in {where[1].removeprefix(f'{OWN_CONFIG}/')}.yaml)" if where else ""
    return (_explain_key(text, stage) or _explain_words(error, text, stage)) + file


def _library(module: str) -> str:
    return module.partition(".")[0]


def _raised_in(error: BaseException) -> str:
    """The library whose code raised an exception, of whatever type."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return _library(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def _explain_key(text: str, stage: str) -> str | None:
    """OmegaConf's complaints name the key: a wrong type, a null, an unknown or a missing key."""
    named = re.search(r"full_key: (\S+)", text)
    if not named:
        return None
    key = named[1]
    if "already at" in text or "not in '" in text or "not in struct" in text:
        return unknown_key(stage, key)
    if interpolation := re.search(r"Interpolation key '(.*?)' not found", text):
        return f"{key} refers to ${{{interpolation[1]}}}, which does not exist"
    if value := re.search(r"Value '(.*?)' (?:of type|could not|is not)", text, re.DOTALL):
        return wrong_value(stage, key, value[1])
    if "not Optional" in text:
        return wrong_value(stage, key, None)
    if "is not a ListConfig" in text:
        return f"{key} must be a list, in brackets: {key}='[A,B]'"
    if value := re.search(r"Cannot assign (\w+)", text):
        return wrong_value(stage, key, value[1])
    return f"{key}: {text.splitlines()[0]}"


def _explain_words(error: BaseException, text: str, stage: str) -> str:
    """Hydra's complaints about a word of the command line, or about a file."""
    override = getattr(error, "override", None)
    if override:  # its grammar could not read the word
        key, _, value = str(override).partition("=")
        return f"cannot read {override}; quote the value: {_quoted(key, value)}"
    if ambiguous := re.search(r"Ambiguous value for argument '(.*?)=(.*)'", text):
        key, value = ambiguous.groups()
        line = f"{key}={value} has a comma; to sweep add -m, "
        if (field := catalog.keys(stage).get(key)) and field.metadata["texts"]:
            return f"{line}for a list write {shlex.quote(f'{key}=[{value}]')}"
        return f"{line}else quote it: {_quoted(key, value)}"
    if appended := re.search(r"already at '(.*?)'", text):
        return f"{appended[1]} exists already; write {appended[1]}=VALUE without +"
    base = re.search(r"Could not load '(\w+)/(\w+)'", text)  # in a defaults list
    told = renamed(stage, f"{base[1]}={base[2]}") if base else None
    return told or " ".join(text.split("\n\n")[0].split())


def _quoted(key: str, value: str) -> str:
    return shlex.quote(f'{key}="{value}"')
