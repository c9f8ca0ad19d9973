"""Checks of a config against what is on disk: data files, rows, model folders, arithmetic."""

import os
import re
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.own_code import parameters_of
from rlhf_cli.config.schema.stages import EvaluateConfig, LabelConfig, RewardConfig, Run
from rlhf_cli.config.selection_rules import REWARD, choosers
from rlhf_cli.config.stages import STAGES, facts_of, makers_of, row_kind_name, stage_name
from rlhf_cli.config.switches import given_to
from rlhf_cli.data.files import STDIN, find, is_local, is_there
from rlhf_cli.data.hub import NAME as HUB_ID
from rlhf_cli.data.kinds import JUDGEMENTS, Demonstration, Prompt, Text, kind_named
from rlhf_cli.data.look import check_split, looked_at
from rlhf_cli.data.parse import SUFFIXES, check_content
from rlhf_cli.data.rows import Rows, text_data
from rlhf_cli.data.sources import check_sources, sources_of
from rlhf_cli.data.templates import chat_template_of, prefix_of
from rlhf_cli.folders.geometry import blocks_of
from rlhf_cli.folders.integrity import check_whole
from rlhf_cli.folders.manifest import (
    ADAPTER_CONFIG,
    LEVELS,
    RESPONSE,
    check_level,
    implicit_reward_of,
    kind_of,
    read_config,
    read_manifest,
    reference_folder,
    scalar_heads,
    shapes_of,
    tokenizer_hash,
)
from rlhf_cli.ranks.environment import is_first
from rlhf_cli.rewards.rules import RULE_NAMES, rule_of
from rlhf_cli.rewards.specs import (
    check_rows_of,
    function_of,
    judges_steps,
    meaning_of,
    models_of,
    refreshed_model,
    response_models,
    signature_of,
    terms_of,
)
from rlhf_cli.runs.lineage import command_of
from rlhf_cli.runs.out_folder import LABELS, TASKS, is_claimed
from rlhf_cli.runs.provenance import baselines_of, named_models, own_loss

READERS = ("judge", "reviser")  # of text: their tokens may be others than the policy's
A_REWARD = "a reward output, a dpo output with a reference, a rule, or file.py:function"


def row_kind(cfg: Run) -> type:
    """The kind of rows that a stage learns from or answers."""
    return kind_named(row_kind_name(cfg))


def check_data(cfg: Run) -> None:
    """Data files exist and say something."""
    data = cfg.data
    prefix_of(data)
    if data.chat_template is not None:
        chat_template_of(data.chat_template)
    named = {key: getattr(data, key) for key in ("path", "eval_path", "text_path")}
    named |= {
        f"sources[{i}].path": each.path for i, each in enumerate(sources_of(data)) if data.sources
    }
    if (samples := getattr(cfg, "samples", None)) is not None:
        _check_sealed("samples", samples)
    for key, value in named.items():
        if data.format == "demo" and key != "text_path" and value is not None:
            raise UserError(f"data=demo brings its own rows; data=jsonl data.{key}=... reads yours")
        if value == STDIN and key == "path" and not facts_of(cfg).holds_out:
            continue
        if value is None:
            if key == "path" and data.format != "demo" and not data.sources:
                raise UserError(f"data={data.format} needs data.path=FILE")
            continue
        if value == STDIN:
            raise UserError(
                f"data.{key}={STDIN}: generate alone reads standard input, as data.path"
            )
        if not is_local(value):  # the hub tells what it has once it is asked
            continue
        for place in value if isinstance(value, list) else [value]:
            _check_sealed(f"data.{key}", place)
        try:
            found = find(value)
            for file in found.train + found.held_out:
                check_content(file)
        except UserError as error:
            raise UserError(f"data.{key}: {error}") from None
    if data.sources:
        check_sources(sources_of(data))


def _check_sealed(key: str, place: str) -> None:
    """`_check_sealed_at` of all that a place may name: of a pattern every folder that fits, whether
    what it names there is there already or not.
    """
    whole = Path(place).expanduser()
    if not has_magic(place) or whole.exists():
        _check_sealed_at(key, whole)
        return
    inside = {Path(each, whole.name) for each in glob(str(whole.parent))}
    for each in sorted(inside.union(map(Path, glob(str(whole))))):
        _check_sealed_at(key, each)


def _check_sealed_at(key: str, whole: Path) -> None:
    """What is named of a stage's folder are rows that it has sealed: no part of them, and of labels
    neither tasks nor events.

    Raises:
        UserError: the stage is not done, or the label folder itself is named.
    """
    folder = whole if whole.is_dir() else whole.parent
    if not is_claimed(folder):
        return
    labelled = (folder / TASKS).is_file()
    there = labelled and whole != folder and whole.exists()  # its tasks do as prompts
    if read_manifest(folder) is None and not there:
        command = command_of(folder)
        way = f"go on with `{command}`" if command else "the command that began it goes on"
        way += ", or seal what is there with accept_partial=true" if labelled else ""
        state = "labelled still" if labelled else "not finished"
        raise UserError(f"{key}={whole}: {folder} is {state}: {way}")
    if labelled and whole == folder:
        rows = [str(folder / name) for name in LABELS if (folder / name).is_file()]
        raise UserError(f"{key}={whole} is a label folder: name its rows, {' or '.join(rows)}")


def is_hub_id(value: str) -> bool:
    """owner/name, with no sign of being meant as a local path."""
    name = value.split(":")[0]
    local = name.startswith((".", "/", "~", "runs/")) or Path(name).suffix in SUFFIXES
    return not local and HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def check_rows(cfg: Run, rows: Rows) -> list[str]:
    """The first rows of local files are sound, of a kind that the stage can use, and have what it
    reads; all of them where they are few.

    The shipped demo is sound; what the hub or standard input holds is known once the stage reads.

    Returns:
        How many rows there are of each source, and what was not read.
    """
    notes = []
    texts = rows.text_places()
    if cfg.data.text_path is not None and texts is not None:
        notes += looked_at(texts.train[0], Text, text_data(cfg.data)).notes
    if cfg.data.format == "demo":
        return notes
    kind = row_kind(cfg)
    places = rows.places(kind)
    notes += places.about()
    looks = [looked_at(source, kind, cfg.data) for source in places.all if is_local(source.path)]
    for look in looks:
        notes += look.notes
        answered = [row for row in look.rows if isinstance(row, Prompt | Demonstration)]
        given = isinstance(cfg, LabelConfig) and cfg.samples is not None  # rewards see its rows
        for _, reward in [] if given else rewards_of(cfg):
            for term in terms_of(reward):
                check_rows_of(term.spec, answered)
        check_judgements(cfg, look.rows)
    splits = facts_of(cfg).holds_out and places.held_out is None
    if splits and looks and all(look.whole for look in looks):
        check_split(places, looks, cfg.data)
    return notes


def what_is_read(cfg: Run) -> dict[str, str]:
    """What a loss reads of each row beside its responses, and the setting by which it does."""
    read, target = {}, getattr(cfg.algo, "target", None)
    if getattr(cfg.algo, "row_margin", None):
        read["margin"] = "algo.row_margin=true"
    if getattr(cfg.algo, "soft_labels", None):
        read["p"] = "algo.soft_labels=true"
    if getattr(cfg.algo, "loss", None) == "kto":
        read["label"] = "algo.loss=kto"
    return read | ({} if target is None else {target: f"algo.target={target}"})


def check_judgements(cfg: Run, rows: Iterable[Any]) -> None:
    """Every row has what the loss reads: its margin, its soft label, its label or its score.

    Raises:
        UserError: naming the first row that has not.
    """
    if not (read := what_is_read(cfg)):
        return
    for row in rows:
        for needed, setting in read.items():
            if getattr(row, needed) is None:
                raise UserError(f"{row.source}: the row says no {needed}, which {setting} reads")


def check_models(cfg: Run) -> None:
    """Every model folder exists and is of the kind that its role needs; policies share one
    vocabulary, rewards need not.
    """
    a_policy = f"an {either(makers_of('policy'))} output"
    for key, role, value in named_models(cfg):
        if role == "reward":
            check_reward(key, value)
        elif isinstance(cfg, RewardConfig) and kind_of(Path(value)) == "reward":
            check_folder(key, value, "reward", A_REWARD)
            check_level(value, LEVELS.get(cfg.algo.loss, RESPONSE))
        else:
            check_folder(
                key, value, role, "a pretrained model" if key == "model.path" else a_policy
            )
            if cfg.start is not None and value != cfg.start and key not in READERS:
                check_tokenizers(key, value, cfg.start)
    if cfg.samples_online:
        check_supervision(cfg)
    if cfg.trains and (judge := getattr(cfg, "judge", None)) is not None:
        check_judge(cfg, judge)
    cache = getattr(cfg, "reference_cache", None)
    if Path(cache or ".").is_file():
        raise UserError(f"reference_cache={cache} is a file; name a folder, or null")
    if isinstance(cfg, EvaluateConfig) and cfg.reward is None and cfg.gold is None:
        raise UserError("evaluate needs reward=... or gold=... to judge by")
    if (anchor := getattr(cfg, "anchor", None)) is not None:
        check_anchor(cfg, anchor)


def check_anchor(cfg: Any, anchor: str) -> None:
    """The policy whose rating is 0 is one of those that are rated."""
    if cfg.samples is not None:
        return  # their names stand in the file
    rated = [str(Path(path)) for path in [cfg.policy, *baselines_of(cfg)]]
    if str(Path(anchor)) not in rated:
        raise UserError(f"anchor={anchor} is none of the policies: {', '.join(rated)}")


def either(names: Sequence[str]) -> str:
    """sft, ppo or dpo."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def rewards_of(cfg: Run) -> list[tuple[str, str]]:
    """The keys of a stage that name rewards, and what they say."""
    return [(key, value) for key, role, value in named_models(cfg) if role == "reward"]


def check_judge(cfg: Any, judge: str) -> None:
    """What labels pairs for a reward model to learn from is not that model."""
    learner = Path(refreshed_model(cfg.reward))
    if os.path.realpath(learner) in map(os.path.realpath, models_of(judge)):
        raise UserError(f"judge={judge} would teach {learner} what it says already")


def check_reward(role: str, reward: str) -> None:
    """Every term of a reward is a sound rule, a function there is, or a folder of its kind."""
    for term in terms_of(reward):
        if (function := function_of(term.spec)) is not None:
            signature_of(*function)
        elif rule_of(term.spec) is None:
            check_folder(role, term.spec, "reward", A_REWARD)


def check_supervision(cfg: Any) -> None:
    """Where steps are rewarded, a term judges steps."""
    if cfg.algo.supervision == "process":
        _check_judges_steps(cfg.reward, "algo.supervision=process")


def _check_judges_steps(reward: str, why: str) -> None:
    if not any(term.weight and judges_steps(term.spec) for term in terms_of(reward)):
        raise UserError(
            f"{why} needs a reward of steps, but no term of reward={reward} judges them: a reward "
            "model of steps does, and a function that names steps"
        )


def reward_lines(cfg: Run) -> list[str]:
    """What each term of the rewards stands for."""
    return [
        f"{role}: {term.weight:g} x {term.spec}: {meaning_of(term.spec)}"
        for role, reward in rewards_of(cfg)
        for term in terms_of(reward)
    ]


def own_loss_lines(cfg: Run) -> list[str]:
    """That a loss is the user's own, and so whose code runs."""
    if (own := own_loss(cfg)) is None:
        return []
    given = given_to(stage_name(cfg), "algo.loss", parameters_of("algo.loss", *own))
    return [f"algo.loss: code of {own[0]} runs: {own[1]} gives the losses, of {', '.join(given)}"]


def check_folder(role: str, path: str, kind: str, meant: str) -> None:
    """A local folder of the right kind with whole weights; a hub id passes."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{role}={path} is a file; {role} needs a folder ({meant})")
        if is_hub_id(path):
            return
        if role == "model.path":
            raise UserError(f"{role}={path} does not exist; give a folder or hub id of a model")
        made = f"run `rlhf-cli {makers_of(kind)[0]} out={path}`"
        if match := re.fullmatch(r"runs/([^/]+)/(\w+)", path):
            name = "" if match[1] == "demo" else f" name={match[1]}"
            if match[2] in STAGES:
                made = f"run `rlhf-cli {match[2]}{name}` first"
        rules = f"; rules are {', '.join(RULE_NAMES)}" if kind == "reward" else ""
        raise UserError(f"{role}={path} does not exist: {made}, or give {role}={meant}{rules}")
    manifest = read_manifest(folder)
    configs = ("config.json", "adapter_config.json")
    foreign = any((folder / name).is_file() for name in configs) and not is_claimed(folder)
    if manifest is None and not foreign:
        if inside := sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}")):
            raise UserError(
                f"{role}={path} holds adapters in folders of their own; name one: "
                f"{', '.join(map(str, inside))}"
            )
        begun = is_claimed(folder)
        way = "the command that began it goes on" if begun else "run the stage that makes it"
        raise UserError(f"{role}={path} holds no finished model; {way}")
    actual = kind_of(folder)
    if kind == "reward" and (implicit := implicit_reward_of(path)) is not None:
        reference_folder(path, implicit)
        actual = kind  # beta log(policy / reference) is a reward
    if kind == "reward" and scalar_heads(shapes_of(folder)):
        actual = kind  # a language model that has a value head, too
    if actual != kind:
        article = "reward model" if actual == "reward" else actual
        raise UserError(f"{role}={path} is a {article}; {role} needs {meant}")
    check_whole(folder)


def check_tokenizers(role: str, path: str, policy: str) -> None:
    """Two local folders have the same vocabulary; hub ids are checked once loaded."""
    hashes = [tokenizer_hash(Path(place)) for place in (path, policy) if Path(place).is_dir()]
    if len(hashes) == 2 and None not in hashes and hashes[0] != hashes[1]:
        raise UserError(
            f"{role}={path} has another tokenizer than policy={policy}; train both from one model"
        )


def check_frozen_layers(cfg: Run) -> None:
    """The model has the blocks that stay as they are; one of the hub is checked once loaded."""
    frozen, path = getattr(cfg.model, "frozen_layers", 0), cfg.start
    if not frozen or path is None or not (config := read_config(Path(path))):
        return
    blocks = blocks_of(config)
    if blocks is not None and frozen > blocks:
        raise UserError(f"model.frozen_layers={frozen}, but {path} has {blocks} blocks")


def check_sampler(cfg: Run) -> None:
    """What of vLLM must be on this machine is there: a server to start, what NCCL goes by."""
    hardware = cfg.hardware
    starts, sends = hardware.rollout_devices is not None, hardware.rollout_sync == "nccl"
    if (starts or sends) and is_first():
        from rlhf_cli.rollout import server_process  # HTTP takes long to import

        if starts:
            server_process.program()
        if sends:
            server_process.check_installed()


def check_labelling(cfg: Run) -> None:
    """Where responses are labelled, the files that are named are there, and what serves a page."""
    if not isinstance(cfg, LabelConfig):
        return
    keys = ("samples", "instructions", "known", "anchors")
    named = [*((key, getattr(cfg, key)) for key in keys), *(("asked", each) for each in cfg.asked)]
    for key, place in named:
        if place is not None and not is_there(place):
            raise UserError(f"{key}={place} does not exist")
    if cfg.anchors is not None and kind_of(Path(cfg.anchors)) != "labels":
        raise UserError(f"anchors={cfg.anchors} is no finished output of label")
    if cfg.algo.protocol == "steps" and cfg.reward is not None:
        _check_judges_steps(cfg.reward, "algo.protocol=steps")
    try:
        Path(cfg.instructions or os.devnull).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"instructions={cfg.instructions} cannot be read: {error}") from None
    if cfg.algo.select == "fisher":
        (chooser,) = choosers(cfg)
        spec = str(cfg.reward) if chooser == REWARD else chooser
        if not response_models(spec):
            raise UserError(
                f"algo.select=fisher reads the last layer of a reward model of whole responses, "
                f"which {spec} is not; give one that `rlhf-cli reward` wrote"
            )
    needed = ("starlette", "uvicorn") if cfg.source == "page" or cfg.review else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(
            f"a page needs {' and '.join(missing)}: pip install 'rlhf-cli[label]', or label "
            "in this terminal: source=terminal"
        )


def check_questions(cfg: Run) -> None:
    """The files that say what a judge or a reviser is asked are there; a stage reads them as it
    starts.
    """
    for key in ("judge_prompt", "principles", "critique_prompt", "revision_prompt"):
        place = getattr(cfg, key, None)
        if place is not None and not Path(place).is_file():
            raise UserError(f"{key}={place} does not exist, or is no file")


def sampler_lines(cfg: Run) -> list[str]:
    """Who samples, where this process does not."""
    hardware = cfg.hardware
    if hardware.rollout_server is not None:
        given = ", which gets the weights of each update" if cfg.samples_online else ""
        several = isinstance(hardware.rollout_server, list)
        given = given.replace("gets", "get") if several else given
        named = ", ".join(hardware.rollout_server) if several else hardware.rollout_server
        return [f"responses: of the vLLM server{'s' * several} {named}{given}"]
    if hardware.rollout_devices is not None:
        gpus = ", ".join(map(str, hardware.rollout_devices))
        return [f"responses: of a vLLM server that is started on GPU {gpus}"]
    return []


def arithmetic(cfg: Run) -> list[str]:
    """The batch arithmetic, spelled out."""
    algo: Any = cfg.algo
    if cfg.samples_online:
        return online_arithmetic(algo)
    if cfg.trains:
        judged = row_kind(cfg) in JUDGEMENTS
        rows = f"{row_kind_name(cfg)} rows" if judged else "rows"
        times = "1 epoch" if algo.epochs == 1 else f"{algo.epochs} epochs"
        most = "" if algo.max_steps is None else f", {algo.max_steps} updates at most"
        return [f"{times} in batches of {algo.batch_size} {rows}{most}"]
    chosen = selection_lines(cfg)
    if (given := getattr(cfg, "samples", None)) is not None:
        return [f"responses: those of samples={given}; keys of sampling are not read", *chosen]
    prompts = "all" if algo.prompts is None else algo.prompts
    return [f"{prompts} prompts x {algo.samples} responses", *chosen]


def selection_lines(cfg: Run) -> list[str]:
    """How label chooses its tasks, where it does not draw them all."""
    if not isinstance(cfg, LabelConfig) or cfg.algo.select == "random":
        return []
    named = [str(cfg.reward or "samples") if name == REWARD else name for name in choosers(cfg)]
    tasks = "one task per prompt" if cfg.algo.tasks is None else f"{cfg.algo.tasks} tasks"
    return [
        f"{tasks}: {cfg.algo.explore:g} of them drawn at random, the others chosen by "
        f"{cfg.algo.select} of {', '.join(named)}"
    ]


def online_arithmetic(algo: Any) -> list[str]:
    """How many responses are sampled, and how many updates are made of them."""
    group = getattr(algo, "group_size", 1)
    updates = algo.batch_size // algo.minibatch_size * algo.epochs
    rollouts = algo.batch_size * group
    lines = [
        f"per iteration: {algo.batch_size} prompts x {group} response{'s' * (group > 1)} = "
        f"{rollouts} rollouts; / minibatch {algo.minibatch_size} prompts x {algo.epochs} epochs = "
        f"{updates} updates",
        f"in all: {algo.steps} iterations, {algo.steps * rollouts} rollouts, "
        f"{algo.steps * updates} updates",
    ]
    if every := getattr(algo, "refresh_reward", None):
        lines.append(
            f"every {every} iterations: the reward model learns from up to {algo.batch_size} "
            "pairs of each"
        )
    return lines
