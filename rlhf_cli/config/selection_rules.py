"""Rules between the keys by which label chooses its tasks."""

from collections.abc import Iterator

from rlhf_cli.config.schema.stages import LabelConfig, Run

BY_SCORES = ("gap", "disagree")
REWARD = "reward="
"""What `reward` says, or a file of responses: a name that no scorer has."""

FEWEST = {"random": 0, "gap": 1, "fisher": 1, "disagree": 2}
"""Rewards that each rule goes by, at least."""


def choosers(cfg: LabelConfig) -> list[str]:
    """The rewards by which tasks are chosen: `reward`, unless it is what labels, and all scorers.

    A file of responses may have what a reward says of them.
    """
    of_file = cfg.samples is not None and cfg.algo.select in BY_SCORES
    own = cfg.source != "reward" and (cfg.reward is not None or of_file)
    return [REWARD] * own + cfg.scorers


def only_drawn(cfg: LabelConfig) -> bool:
    """Whether tasks are drawn from responses that exist: no model samples, scores or chooses."""
    scored = cfg.reward is not None or bool(cfg.scorers)
    return cfg.samples is not None and not scored and cfg.algo.select == "random"


def selection_rules(cfg: Run) -> Iterator[str]:
    """What algo.select needs: rewards to go by, and something to choose from."""
    if not isinstance(cfg, LabelConfig) or cfg.algo.select == "random":
        return
    rule, named = f"algo.select={cfg.algo.select}", choosers(cfg)
    if (protocol := cfg.algo.protocol) in ("thumbs", "steps"):
        yield f"{rule} compares responses, of which a task of algo.protocol={protocol} has one"
    why = f": reward={cfg.reward} is what labels" if cfg.source == "reward" and cfg.reward else ""
    if len(named) < FEWEST[cfg.algo.select]:
        needed = "two rewards that may differ" if cfg.algo.select == "disagree" else "a reward"
        yield f"{rule} needs {needed} to choose by{why}; give scorers=[...]"
    specs = [cfg.reward if name == REWARD else name for name in named]
    if twice := [spec for spec in specs if spec is not None and specs.count(spec) > 1]:
        yield f"{rule} would hear {twice[0]} twice; name each reward once"
    if cfg.algo.select == "fisher" and len(named) > 1:
        yield f"{rule} asks what one reward model does not know, but there are {', '.join(named)}"
    pool = cfg.algo.samples * (1 + len(cfg.baselines))
    size = 2 if protocol == "pair" else cfg.algo.responses
    if cfg.samples is None and cfg.algo.tasks is None and pool <= size:
        yield (
            f"{rule} has nothing to choose from: {pool} responses to a prompt, of which a task has "
            f"{size}; raise algo.samples, or give algo.tasks"
        )
