"""What was made from what: the folders that stages wrote, as trees, told without torch."""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config import catalog
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.secrets import filled_in
from rlhf_cli.config.stages import STAGES, place_in_chain
from rlhf_cli.data.files import is_there
from rlhf_cli.data.stdin import STDIN
from rlhf_cli.folders.integrity import check_files
from rlhf_cli.folders.manifest import EXPORTED, MANIFEST, content_hash, read_manifest
from rlhf_cli.runs.begun import begun_with
from rlhf_cli.runs.lock import running
from rlhf_cli.runs.out_files import CHECKPOINTS, CONFIG, STEP, is_claimed, what_is_kept
from rlhf_cli.runs.provenance import ROWS, input_hash

PARENTS, INPUTS = "parents", "inputs"
KINDS = (PARENTS, INPUTS)
POLICY, REWARD = "policy", "reward"  # roles, and what stages write
MAIN_ROLES = (POLICY, "model")  # whose weights a stage goes on from
HEADER = re.compile(r"# (?:rlhf-cli (?P<words>.*)|rlhf_cli\.stages\.(?P<stage>\w+)\.run)")

ERROR = "_stderr"  # of another figure

Figures = dict[str, float]
HashOf = Callable[[str, str], str | None]
"""The hash now of what stands under `parents` or `inputs`, by kind and path."""


@dataclass
class RunInput:
    """Something that a stage read.

    kind: parents, a model or a folder in which a stage has left rows; or inputs, data or a file
        with reward functions.
    fault: what is wrong with it now: `has changed since`, `is gone`, or `cannot be read`.
    """

    kind: str
    role: str
    path: str
    place: Path
    fault: str | None = None


@dataclass
class Node:
    """A folder that a stage wrote, or writes, and what was made from it.

    made_with: the option of `algo`, else the loss; None where neither is known.
    state: in words: finished, stopped, unfinished, running or damaged.
    seconds: working time; None until it has ended.
    ended: seconds since the epoch.
    sources: all that it read; `main` is the one whose weights it goes on from, and `under` the one
        that it hangs under among other runs.
    """

    folder: Path
    stage: str | None
    made_with: str | None
    state: str
    seed: int | None
    seconds: float | None
    ended: float | None
    figures: Figures
    sources: list[RunInput]
    main: RunInput | None
    under: RunInput | None = None
    children: list["Node"] = field(default_factory=list)


def trees(folders: Sequence[Path]) -> list[Node]:
    """The runs in and below folders, each under what it was made from, as `arranged` has it.

    What a run writes inside its own folder, such as a refreshed reward model, hangs under the run.
    """

    @cache  # reads weights, so once for each folder
    def hash_of(kind: str, place: str) -> str | None:
        return content_hash(place) if kind == PARENTS else input_hash(place)

    return arranged([read_node(place, hash_of) for place in runs_in(folders)])


def arranged(found: Iterable[Node]) -> list[Node]:
    """Runs under those whose weights they go on from; the ones that hang under none.

    What learnt from rows that a stage has left, such as labels, hangs under these, the last ones if
    there are several, and what is trained on such a reward model under that: rounds of labels stand
    one beneath the other.
    """
    nodes = {node.folder.resolve(): node for node in found}
    above: dict[Path, Path] = {}
    for place, node in nodes.items():
        if place.parent in nodes and not is_claimed(place):  # what a run writes inside its own
            above[place] = place.parent
            continue
        for source in _leads(node, nodes):
            parent = _place(source, nodes)
            if parent in nodes and place not in _ancestry(parent, above):
                above[place], node.under = parent, source
                break
    for place in sorted(nodes, key=lambda each: _order(nodes[each])):
        if place in above:
            nodes[above[place]].children.append(nodes[place])
    return sorted((node for place, node in nodes.items() if place not in above), key=_order)


def _leads(node: Node, nodes: Mapping[Path, Node]) -> Iterator[RunInput]:
    """What a run can hang under, the first choice first."""
    facts = STAGES.get(node.stage or "")
    if facts and facts.writes in (POLICY, REWARD):
        for source in node.sources:
            judge = nodes.get(_place(source, nodes)) if source.role == REWARD else None
            if judge is not None and any(each.role == ROWS for each in judge.sources):
                yield source
        yield from reversed([source for source in node.sources if source.role == ROWS])
    if node.main is not None:
        yield node.main


def _place(source: RunInput, nodes: Mapping[Path, Node]) -> Path:
    """Where a source lies; of a snapshot, its run."""
    place = Path(os.path.realpath(source.place))
    kept = STEP.fullmatch(place.name) is not None and place.parent in nodes
    return place.parent if kept else place


def _ancestry(place: Path, above: dict[Path, Path]) -> Iterator[Path]:
    """A folder, what it was made from, and so on up."""
    while True:
        yield place
        if place not in above:
            return
        place = above[place]


def _order(node: Node) -> tuple[int, str]:
    return place_in_chain(node.stage), str(node.folder)


def runs_in(folders: Sequence[Path]) -> Iterator[Path]:
    """The folders of stages, in and below others; none hidden, no resume points, no snapshots."""
    for top in folders:
        for name, below, files in os.walk(top):
            place = Path(name)
            claimed = CONFIG in files and is_claimed(place)
            below[:] = [
                each
                for each in below
                if each[:1] != "." and each != CHECKPOINTS
                if not (claimed and STEP.fullmatch(each))
            ]
            if MANIFEST in files or claimed:
                yield place


# --------------------------------------------------------------------------- one folder


def read_node(folder: Path, hash_of: HashOf) -> Node:
    """What a folder says of itself, compared with what it was made from."""
    run = run_of(folder)
    header, config = _config_of(run) if is_claimed(run) else ("", {})
    try:
        manifest = read_manifest(folder)
        check_files(folder)
        damaged = False
    except (UserError, OSError):
        manifest, damaged = None, True
    said = manifest or {}
    stage, option = _stage_and_option(header)
    stage = _text(said.get("stage")) or stage
    algo = config.get("algo")
    loss = algo.get("loss") if isinstance(algo, dict) else None
    base = _base(run, config)
    try:
        sources = list(_recorded(said if manifest else begun_with(folder), base))
        for source, recorded in sources:
            source.fault = _fault(source, recorded, hash_of)
    except (UserError, TypeError, LookupError, AttributeError):  # a field of another shape
        sources, damaged = [], True
    models = [source for source, _ in sources if source.kind == PARENTS]
    main = next((each for role in MAIN_ROLES for each in models if each.role == role), None)
    seconds, seed = said.get("seconds"), said.get("seed", config.get("seed"))
    ended = bool(said.get("complete"))
    return Node(
        folder=folder,
        stage=stage,
        made_with=option or _text(loss),
        state="damaged" if damaged else _state(folder, said),
        seed=seed if isinstance(seed, int) else None,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        ended=(folder / MANIFEST).stat().st_mtime if ended else None,
        figures=_figures((said.get(EXPORTED) or {}).get("stage") or stage, said),
        sources=[source for source, _ in sources],
        main=main or (models[0] if models else None),
    )


def run_of(folder: Path) -> Path:
    """The folder of the run that wrote a folder: itself, or the one that it lies in."""
    return folder if is_claimed(folder) else folder.parent


def command_of(folder: Path) -> str | None:
    """The command that made a folder of ours, as it was typed; None where it is not known."""
    lines = _lines(folder)
    match = HEADER.match(lines[0]) if lines else None
    return None if match is None or match["words"] is None else f"rlhf-cli {match['words']}"


def config_text(folder: Path) -> str:
    """The config of the run that made a folder of ours, as its file has it, without comments."""
    return "\n".join(line for line in _lines(folder) if not line.startswith("#"))


def config_of_run(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote, or writes, a folder; empty where it cannot be read."""
    run = run_of(folder)
    return _config_of(run)[1] if is_claimed(run) else {}


def paths_start(folder: Path) -> Path:
    """Where relative paths start in what a folder of ours says that it was made from."""
    return _base(run_of(folder), config_of_run(folder))


def _lines(folder: Path) -> list[str]:
    """The lines of config.yaml; none where no run of ours made the folder."""
    run = run_of(folder)
    if not is_claimed(run) or (run != folder and not (folder / MANIFEST).is_file()):
        return []
    with suppress(OSError, ValueError):
        return (run / CONFIG).read_text(encoding="utf-8").splitlines()
    return []


def _config_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The first line of config.yaml and what it holds; nothing where it cannot be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if isinstance(config, dict):
            return text.partition("\n")[0], filled_in(config)
    return "", {}


def _stage_and_option(header: str) -> tuple[str | None, str | None]:
    """The stage and the option of `algo` by the command in the first line of config.yaml."""
    match = HEADER.match(header)
    if match is None or match["words"] is None:
        return (match["stage"] if match else None), None
    try:
        stage, *words = shlex.split(match["words"])
    except ValueError:
        return None, None
    options = [word.partition("=")[2] for word in words if word.startswith("algo=")]
    if options:  # of a sweep over several, each job has its own
        return stage, None if "," in options[-1] else options[-1]
    if stage not in STAGES or any(word.split("=")[0] == "--config" for word in words):
        return stage, None  # a file may name another
    return stage, catalog.default_options(stage).get("algo")


def _base(run: Path, config: dict[str, Any]) -> Path:
    """Where relative paths of a run start: the folder in which its `out` leads to where it is."""
    place, out = run.resolve(), Path(_text(config.get("out")) or "")
    count = len(out.parts)
    if count and not out.is_absolute() and place.parts[-count:] == out.parts:
        return Path(*place.parts[:-count])
    return Path()


def _recorded(manifest: dict[str, Any], base: Path) -> Iterator[tuple[RunInput, str]]:
    """What a run says that it was made from, with the hashes of then."""
    for kind in KINDS:
        for role, entry in (manifest.get(kind) or {}).items():
            path = entry["path"]
            if path == STDIN:  # nobody can look there again
                continue
            place = base / os.path.expanduser(path)
            yield RunInput(kind, role.split()[0], path, place), entry["hash"]


def _fault(source: RunInput, recorded: str, hash_of: HashOf) -> str | None:
    if not is_there(str(source.place)):
        return "is gone"
    try:
        now = hash_of(source.kind, str(source.place))
    except (UserError, OSError):
        return "cannot be read"
    return None if now == recorded else "has changed since"


def _state(folder: Path, manifest: dict[str, Any]) -> str:
    if (owner := running(folder)) is not None:
        return f"running ({owner})"
    if manifest.get("complete"):
        stopped = manifest.get("stopped")
        if not isinstance(stopped, dict):
            return "finished"
        return f"stopped at step {stopped.get('step')} by {_listed(stopped.get('alarms'))}"
    kept = what_is_kept(folder)
    return "unfinished" if kept is None else f"unfinished at {kept}"


def _figures(stage: str | None, manifest: dict[str, Any]) -> Figures:
    """The metrics that a stage is judged by; of an evaluation the judged policy's."""
    metrics = manifest.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    facts = STAGES.get(stage or "")
    headline = facts.headline if facts else ()
    if facts and facts.writes == "report":
        with suppress(TypeError, KeyError, AttributeError):
            policy = str(Path(manifest["parents"]["policy"]["path"]))
            judged = metrics["policies"][policy]
            means = {name: judged[name]["mean"] for name in headline if judged.get(name)}
            return {name: mean for name, mean in means.items() if mean is not None}  # infinite
        return {}
    plain = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    known = {name: plain[name] for name in headline if name in plain}
    others = [name for name in plain if name.startswith("eval/") and not name.endswith(ERROR)][:1]
    return known or {name: plain[name] for name in others}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
