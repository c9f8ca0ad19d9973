"""The last lines of a run: a sentence with the figure that matters, five numbers, what comes next.

All else is in the files that they name; docs/metrics.md says what each name means.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config import catalog
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import STAGES, stage_name
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.manifest import accuracy_by_source, kind_of
from rlhf_cli.reporting.grid import show, with_error
from rlhf_cli.runs.begun import command_line
from rlhf_cli.runs.out_files import SAMPLES

Metrics = Mapping[str, Any]
Rows = Sequence[Metrics]
"""Lines of metrics.jsonl."""

SHOWN = 5  # numbers
NUMBERS = {
    "label": ("labels", "ties", "agreement", "alpha", "self_agreement", "reward_agreement"),
    "sft": ("eval/kl", "eval/loss", "eval/perplexity", "eval/reward", "text/loss"),
    "reward": (
        *("eval/loss", "eval/calibration_error", "eval/length_correlation"),
        *("eval/longer_preferred", "eval/accuracy_prompt_exchanged", "eval/auc", "eval/top1"),
    ),
    "dpo": (
        *("eval/loss", "eval/kl", "eval/rewards/margin", "eval/logprobs/chosen"),
        *("eval/logprobs/rejected", "eval/calibration_error"),
    ),
    "ppo": ("reward", "kl", "entropy", "length", "ended", "text/loss"),
    "grpo": ("reward", "kl", "entropy", "length", "ended", "equal_groups"),
    "generate": (
        *("reward", "reward_none", "demonstrations", "demonstrations/reward", "preferences"),
    ),
    "evaluate": (),
}
"""The numbers of each stage, as far as a run has them; the first ones are shown."""

FILES = {
    "rankings.jsonl": "rows for reward",
    "feedback.jsonl": "rows for reward algo=pointwise and, of thumbs, dpo algo=kto",
    "stepwise.jsonl": "rows for reward algo=process",
    "report.json": "tables",
    "frontier.png": "scores over KL",
    "win_rates.png": "over temperature",
    "reliability.png": "calibration",
    "metrics.jsonl": "each step",
    "samples.jsonl": "samples",
    "demonstrations.jsonl": "rows for sft",
    "preferences.jsonl": "rows for reward and dpo",
}
"""What lies beside stage.json, in a word."""

AFTER = {
    "sft": ("reward", "dpo"),
    "reward": ("ppo",),
    "ppo": ("evaluate",),
    "dpo": ("evaluate",),
    "grpo": ("evaluate",),
}
"""The stages that go on from each."""


class Moved(NamedTuple):
    """A figure when it was first measured, after a step, and at the end, with its error there."""

    step: int
    first: float
    last: float
    stderr: float | None

    @property
    def rose(self) -> bool:
        """By more than its error."""
        return self.last - self.first > (self.stderr or 0.0)

    @property
    def fell(self) -> bool:
        """By more than its error."""
        return self.first - self.last > (self.stderr or 0.0)

    def __str__(self) -> str:
        """`rose from 0.34 (step 1) to 0.50 ± 0.03`, and so on."""
        verb = "rose" if self.rose else "fell" if self.fell else "went"
        last = with_error(self.last, self.stderr)
        if show(self.first) == show(self.last):
            return f"stayed at {last}"
        return f"{verb} from {show(self.first)} (step {self.step}) to {last}"


def last_lines(cfg: Run, metrics: Metrics, rows: Rows, told: str | None = None) -> list[str]:
    """The lines at the end of a run but for the last one, which says where it was written.

    Args:
        metrics: of what was written.
        rows: of its log, oldest first; none where it has no log.
        told: the sentence, where the stage says it itself.
    """
    stage, out = stage_name(cfg), Path(cfg.out)
    sentence = told or _SENTENCES[stage](metrics, rows)
    numbers = [
        f"{name} {with_error(metrics[name], metrics.get(f'{name}_stderr'))}"
        for name in NUMBERS[stage]
        if _is_number(metrics.get(name))
    ]
    files = [f"{name} ({what})" for name, what in FILES.items() if (out / name).is_file()]
    return [
        *([f"{stage}: {sentence}"] if sentence else []),
        *([", ".join(numbers[:SHOWN])] if numbers else []),
        f"all figures in {out}: {', '.join(['stage.json', *files])}",
        *_next(cfg, stage),
    ]


def moved(name: str, metrics: Metrics, rows: Rows) -> Moved | None:
    """How a figure went; None where it was measured once, or never."""
    first = next((row for row in rows if _is_number(row.get(name))), None)
    if first is None or not _is_number(metrics.get(name)) or len(rows) < 2:
        return None
    return Moved(first["step"], first[name], metrics[name], metrics.get(f"{name}_stderr"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --------------------------------------------------------------------------- sentences


def _of_sft(metrics: Metrics, rows: Rows) -> str:
    line = f"the held-out loss {_went('eval/loss', metrics, rows)} nats per token"
    if _is_number(metrics.get("eval/kl")):
        line = f"the KL from the model under the prefix {_went('eval/kl', metrics, rows)} per token"
    if _is_number(metrics.get("eval/reward")):
        line += f", the reward of responses {_went('eval/reward', metrics, rows)}"
    return line


def _went(name: str, metrics: Metrics, rows: Rows) -> str:
    """How a figure went, or what it is."""
    how = moved(name, metrics, rows)
    return str(how or f"is {with_error(metrics[name], metrics.get(f'{name}_stderr'))}")


def of_scores(metrics: Metrics, whose: str) -> str:
    """How held-out rows are judged by scores, and what they must beat."""

    def figure(name: str) -> str:
        return with_error(float(metrics[f"eval/{name}"]), metrics.get(f"eval/{name}_stderr"))

    if "eval/kendall_tau" in metrics:
        count = round(metrics["eval/rankings"])
        return (
            f"{whose} order {count} held-out rankings with a Kendall tau of {figure('kendall_tau')}"
        )
    if "eval/mse" in metrics:
        count = round(metrics["eval/targets"])
        return f"{whose} miss {count} held-out targets by a squared error of {figure('mse')}"
    if "eval/accuracy" not in metrics:
        return ""
    if "eval/base_rate" in metrics:
        least, rule = metrics["eval/base_rate"], "the more frequent label"
        things = f"{metrics['eval/labels']:.0f} held-out labels"
    else:
        coin, longer = 0.5, metrics.get("eval/longer_accuracy", 0.0)
        least, rule = (longer, "the longer one") if longer > coin else (coin, "a coin")
        things = f"{metrics['eval/pairs']:.0f} held-out pairs"
    line = f"{whose} are right on {figure('accuracy')} of {things}, {rule} on {show(least)}"
    low = metrics.get("eval/accuracy_low")
    if _is_number(low) and low <= least:
        line += ": too few rows to tell them apart, or nothing was learnt"
    return line


def _of_reward(metrics: Metrics, rows: Rows) -> str:
    line = of_scores(metrics, "its scores")
    unsure = [
        f"{source} ({with_error(of['accuracy'], of['accuracy_stderr'])})"
        for source, of in accuracy_by_source(metrics).items()
        if not of["accuracy_low"] > 0.5
    ]
    return line + (f"; not yet told from a coin on {', '.join(unsure)}" if unsure else "")


def _of_dpo(metrics: Metrics, rows: Rows) -> str:
    line = of_scores(metrics, "its implicit rewards")
    line = line or f"the held-out loss {_went('eval/loss', metrics, rows)}"
    if _is_number(kl := metrics.get("eval/kl")):
        line += f"; the KL to the reference is {show(kl)} nats per response"
    return line


def _online(metrics: Metrics, rows: Rows) -> str:
    """The reward, and gold beside it where it was measured: one that rises alone is fooled."""
    held_out = _is_number(metrics.get("eval/reward"))
    place = "eval/reward" if held_out else "reward"
    if not _is_number(metrics.get(place)):
        return "no response of what was written has a reward"
    line = f"the reward {_went(place, metrics, rows)}"
    if held_out:
        line = f"on held-out prompts {line}"
    if _is_number(metrics.get("eval/gold")):
        reward, gold = moved(place, metrics, rows), moved("eval/gold", metrics, rows)
        fooled = bool(reward and reward.rose and gold and gold.fell)
        line += f" {'while' if fooled else 'and'} gold {_went('eval/gold', metrics, rows)}"
        line += ": the reward is fooled; algo.keep=eval/gold, or more algo.kl_coef" * fooled
    return line


def _of_generate(metrics: Metrics, rows: Rows) -> str:
    return f"{metrics['samples']} responses"


_SENTENCES = {
    "sft": _of_sft,
    "reward": _of_reward,
    "dpo": _of_dpo,
    "ppo": _online,
    "grpo": _online,
    "generate": _of_generate,
    "label": lambda metrics, rows: "",
    "evaluate": lambda metrics, rows: "",
}


# --------------------------------------------------------------------------- what comes next


def _next(cfg: Run, stage: str) -> list[str]:
    """The commands that go on from a run, as they would be typed."""
    if stage == "generate":
        return [f"next: head -3 {shlex.quote(str(Path(cfg.out, SAMPLES)))}"]
    if stage == "label":
        return _after_labels(cfg)
    if stage == "evaluate":
        return [f"next: rlhf-cli export {shlex.quote(cfg.start or 'DIR')} my-model"]
    commands = [
        f"rlhf-cli {' '.join([each, *_words(cfg, stage, each)])}" for each in AFTER.get(stage, ())
    ]
    return [f"next: {', or '.join(commands)}"] if commands else []


def _after_labels(cfg: Run) -> list[str]:
    """What reads each kind of rows, those with all that was said first."""
    readers = {
        "rankings.jsonl": "reward algo=kwise",
        "preferences.jsonl": "reward",
        "feedback.jsonl": "dpo algo=kto",
        "stepwise.jsonl": "reward algo=process",
    }
    files = [(Path(cfg.out, name), reader) for name, reader in readers.items()]
    found = [f"{reader} data=jsonl data.path={file}" for file, reader in files if file.is_file()]
    words = _steps(cfg) if (Path(cfg.out) / "stepwise.jsonl").is_file() else ""
    return [f"next: rlhf-cli {each}{words}" for each in found[:1]]


def _steps(cfg: Run) -> str:
    """The words by which steps are read as they were cut, where others than the usual ones."""
    usual = catalog.stage_values("reward", {"data": "jsonl"}, catalog.config_dirs())
    own = {f"data.{key}": getattr(cfg.data, key) for key in ("step_join", "step_end")}
    return "".join(
        f" {shlex.quote(f'{key}={value!r}')}" for key, value in own.items() if value != usual[key]
    )


def _words(cfg: Run, stage: str, following: str) -> list[str]:
    """The words that lead the next stage to what this one wrote, and to the same rows."""
    start = catalog.stage_values(following, {}, catalog.config_dirs())
    words = [] if cfg.name == start["name"] else [f"name={cfg.name}"]

    def named(key: str, value: str | None) -> list[str]:
        usual = str(start.get(key, "")).replace("${name}", cfg.name)
        return [f"{key}={value}"] if key in start and value and value != usual else []

    if STAGES[stage].writes == "reward":
        speaks = cfg.start is not None and kind_of(folder_of(cfg.start)) == "policy"
        words += named("policy", cfg.start if speaks else None) + named("reward", cfg.out)
    else:
        words += named("policy", cfg.out)
        words += named("reward", getattr(cfg, "reward", None)) if following == "evaluate" else []
    typed = shlex.split(command_line() or "")[2:]
    said = [word for word in typed if word.startswith(("data=", "data.", "model.trust_"))]
    words += [word for word in said if not word.startswith("data.prefix=")]
    return [shlex.quote(word) for word in words]
