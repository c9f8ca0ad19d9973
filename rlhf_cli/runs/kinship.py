"""Whether a judge is of the family of those whose responses it judges."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.folders.manifest import content_hash, read_manifest
from rlhf_cli.runs.provenance import baselines_of

GOES_ON_FROM = ("policy", "model")  # roles of parents whose weights a model began with


def kinship_lines(cfg: Any) -> list[str]:
    """A warning for each policy that began with the weights of the judge, or as the judge did.

    Models of the hub have no record of their parents and are compared by nothing.
    """
    judge = getattr(cfg, "judge", None)
    if cfg.trains or judge is None or not Path(judge).is_dir():
        return []
    family = ancestry(judge)
    lines = []
    for path in dict.fromkeys(each for each in [cfg.policy, *baselines_of(cfg)] if each):
        shared = next((place for mark, place in ancestry(path).items() if mark in family), None)
        if shared is not None:
            lines.append(
                f"warning: judge={judge} and {path} both come from {shared}: a judge may favour "
                "its own family"
            )
    return lines


def ancestry(path: str) -> dict[str, str]:
    """The folder of a policy and those that its weights come from, nearest first, by hash."""
    return dict(_ancestors(path, content_hash(path))) if Path(path).is_dir() else {}


def _ancestors(path: str, mark: str) -> Iterator[tuple[str, str]]:
    yield mark, path
    parents = (read_manifest(path) or {}).get("parents") or {}
    for role in GOES_ON_FROM:
        if role in parents and parents[role]["path"] != path:
            yield from _ancestors(parents[role]["path"], parents[role]["hash"])
