"""What is known of each stage before it runs, told once: a line of STAGES for each.

Checks, help, `ls`, completion, lineage and the report of `evaluate` read it here. What the models
of a stage are is told by the keys that name them: `key(..., role=...)` in schema/.
"""

from dataclasses import dataclass

from rlhf_cli.config.schema.stages import (
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    LabelConfig,
    PpoConfig,
    RewardConfig,
    Run,
    SftConfig,
)


@dataclass(frozen=True)
class Stage:
    """The facts of a stage.

    config: its schema, whose docstring is its sentence.
    rows: the kind of rows that it reads, in the word of data/kinds.py; losses may differ, see
        ROWS_OF_LOSS.
    writes: the kind of folder that it writes, as stage.json has it.
    headline: the metrics that it is judged by; the first `eval/` one where it has none of these.
    """

    config: type[Run]
    rows: str
    writes: str
    headline: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What the stage does, in one line."""
        return " ".join((self.config.__doc__ or "").split())

    @property
    def holds_out(self) -> bool:
        """Whether it holds rows out; to sample is to answer every row."""
        return self.writes not in ("samples", "labels")


STAGES: dict[str, Stage] = {
    "sft": Stage(SftConfig, "demonstration", "policy", ("eval/loss",)),
    "reward": Stage(RewardConfig, "preference", "reward", ("eval/accuracy",)),
    "ppo": Stage(PpoConfig, "prompt", "policy", ("reward", "eval/gold")),
    "dpo": Stage(DpoConfig, "preference", "policy", ("eval/rewards/accuracy",)),
    # the last is that of its refreshed reward model
    "grpo": Stage(GrpoConfig, "prompt", "policy", ("reward", "eval/gold", "refresh/accuracy")),
    "generate": Stage(GenerateConfig, "prompt", "samples", ("reward",)),
    "label": Stage(LabelConfig, "prompt", "labels", ("labels", "agreement")),
    "evaluate": Stage(EvaluateConfig, "prompt", "report", ("gold", "reward")),
}
"""Every stage by its subcommand, in the order of a chain."""

ROWS_OF_LOSS = {
    "kwise": "ranking",
    "plackett_luce": "ranking",
    "pointwise": "feedback",
    "kto": "feedback",
    "process": "stepwise",
}
"""The kind of rows that a loss reads where it is not that of its stage."""

DEMO_SIZE = 2e6
"""Parameters up to which a model is trained and computed as the demo's is."""

WITHOUT_REFERENCE = ("orpo", "simpo", "preferred_ft", "unlikelihood")
"""Losses of dpo that compare with no reference."""

PER_TOKEN = ("length_normalised", "ipo_mean", "orpo", "simpo")
"""Losses of dpo of means over tokens, not of sums."""


def stage_name(cfg: Run) -> str:
    """The subcommand that a typed config belongs to."""
    return next(name for name, stage in STAGES.items() if type(cfg) is stage.config)


def facts_of(cfg: Run) -> Stage:
    """What is known of the stage that a typed config belongs to."""
    return STAGES[stage_name(cfg)]


def row_kind_name(cfg: Run) -> str:
    """The kind of rows that a config learns from or answers, in the word of data/kinds.py."""
    return rows_with(facts_of(cfg), getattr(cfg.algo, "loss", None))


def rows_with(stage: Stage, loss: str | None) -> str:
    """The kind of rows that a stage reads with a loss; None is none."""
    return ROWS_OF_LOSS.get(loss or "", stage.rows)


def has_reference(cfg: Run) -> bool:
    """Whether a policy is trained beside a frozen one that it is compared with."""
    compares = cfg.samples_online or hasattr(cfg, "reference") or cfg.data.prefix is not None
    return cfg.trains and compares and getattr(cfg.algo, "loss", None) not in WITHOUT_REFERENCE


def makers_of(kind: str) -> list[str]:
    """The stages that write a kind of folder; a chain begins with the first."""
    return [name for name, stage in STAGES.items() if stage.writes == kind]


def place_in_chain(name: str | None) -> int:
    """Where a stage stands in STAGES; what is no stage comes last."""
    names = list(STAGES)
    return names.index(name) if name in names else len(names)
