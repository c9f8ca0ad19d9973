"""Whether a judge is of the family of those whose responses it judges."""

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
    if not Path(path).is_dir():
        return {}
    found: dict[str, str] = {}
    left = [(content_hash(path), path)]
    while left:
        mark, place = left.pop(0)
        if mark in found:  # folders that were made anew from each other
            continue
        found[mark] = place
        parents = (read_manifest(place) or {}).get("parents") or {}
        named = [parents[role] for role in GOES_ON_FROM if role in parents]
        left += [(parent["hash"], parent["path"]) for parent in named]
    return found
