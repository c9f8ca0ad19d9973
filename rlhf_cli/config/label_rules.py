"""Rules between the keys of label: who labels what."""

import re
from collections.abc import Iterator

from rlhf_cli.config.evaluation_rules import unsampled
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.stages import LabelConfig, Run


def label_rules(cfg: Run) -> Iterator[str]:
    """Who labels what."""
    if not isinstance(cfg, LabelConfig):
        return
    named = cfg.annotators
    if not named or len(set(named)) < len(named):
        yield f"annotators={named}: name each once, and at least one"
    if wrong := [
        name for name in named if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}", name)
    ]:
        yield f"annotators: {wrong[0]!r} names a file: up to 40 letters, digits, _, . and -"
    if cfg.who is not None and cfg.who not in named:
        yield f"who={cfg.who} is none of annotators={named}"
    if cfg.data.path == "-":
        yield "data.path=-: what labels are typed into cannot hold the rows; give a file"
    if cfg.hardware.processes not in (1, AUTO):
        yield f"hardware.processes={cfg.hardware.processes}: one process labels; set it to 1"
    if cfg.policy is None and (cfg.samples is None or cfg.reward is not None or cfg.scorers):
        yield (
            "policy=null needs samples=FILE, reward=null and scorers=[]: rewards are given a "
            "policy's tokens"
        )
    if cfg.samples is not None and cfg.baselines:
        yield f"baselines are sampled from, but samples={cfg.samples} has all; set them to []"
    if cfg.samples is not None:
        yield from unsampled(cfg)
    if cfg.source == "reward" and cfg.reward is None and cfg.samples is None:
        yield "source=reward needs reward=..., or samples=FILE with rewards in it"
    if cfg.port and cfg.source != "page" and not cfg.review:
        yield f"port={cfg.port} is that of a page: source=page and review=true show one, or set 0"
    yield from _protocol(cfg)


def _protocol(cfg: LabelConfig) -> Iterator[str]:
    """Who can be asked what."""
    protocol = cfg.algo.protocol
    if protocol == "instructgpt" and cfg.source in ("reward", "judge"):
        yield f"algo.protocol=instructgpt asks for ratings and marks: source={cfg.source} has none"
    if protocol == "steps" and cfg.source == "reward" and cfg.reward is None:
        yield "algo.protocol=steps source=reward needs reward=... that judges steps"
    if protocol == "steps" and cfg.flip:
        yield "flip turns an answer round, but algo.protocol=steps has none to turn; set it to 0"
