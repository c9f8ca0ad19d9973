"""What an evaluation has found of each policy, and the report that is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.order import derived_seed
from rlhf_cli.evaluation.bench import Bench
from rlhf_cli.evaluation.choices import by_chance, right_answers
from rlhf_cli.evaluation.contest import REFERENCES, Contest
from rlhf_cli.evaluation.entrants import Entrant
from rlhf_cli.evaluation.figures import (
    Figures,
    Sampled,
    change_of,
    figures_of,
    losses_of,
    mean_loss,
)
from rlhf_cli.evaluation.frontier import frontier_of
from rlhf_cli.evaluation.pair_judge import Text, Texts
from rlhf_cli.evaluation.samples import (
    JUDGED,
    generated_row,
    known_or_none,
    parts_at,
    term_columns,
)
from rlhf_cli.objectives.comparisons import paired_difference
from rlhf_cli.objectives.estimates import clustered_mean
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.policy import Policy


@dataclass
class Findings:
    """What has been found of each policy, and in the end the report.

    names: of the policies, the one that is judged first.
    contests: the scores of all, by temperature.
    results: the figures of each.
    read: the responses of each to each prompt that a judge reads.
    lines: of samples.jsonl: what each wrote, and what each judge says of it.
    bounds: what is best at all, of responses that were enumerated; None without any.
    """

    cfg: EvaluateConfig
    names: list[str] = field(default_factory=list)
    contests: dict[float, Contest] = field(default_factory=dict)
    results: dict[str, Figures] = field(default_factory=dict)
    read: dict[str, Texts] = field(default_factory=dict)
    lines: list[dict[str, object]] = field(default_factory=list)
    bounds: Figures | None = None
    _every: list[Sampled] = field(default_factory=list)
    _main: dict[str, Sampled] = field(default_factory=dict)
    _losses: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    _right: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """At first the temperature of all figures, then those for win rates alone."""
        algo = self.cfg.algo
        for temperature in [algo.temperature, *algo.temperatures]:
            self.contests[temperature] = Contest(algo.tie)

    def add(
        self,
        name: str,
        sampled: Sampled,
        temperature: float,
        tokens: Sequence[Mapping[str, object]],
    ) -> None:
        """All responses of a policy at a temperature, judged.

        Args:
            tokens: of each response its KL, where it is known, and what `TokenLines` makes of it.
        """
        self.names += [name] if name not in self.names else []
        self.contests[temperature].scores[name] = sampled.decisive
        self._every.append(sampled)
        if temperature == self.cfg.algo.temperature:
            self._main[name] = sampled
            first = range(0, len(sampled.rollouts), sampled.samples)
            count = min(self.cfg.judge_samples, sampled.samples)
            self.read[name] = [list(map(text_of, sampled.rollouts[i : i + count])) for i in first]
        said = sampled.said
        columns = {judge: known_or_none(scores.total) for judge, scores in said.items()}
        parts = term_columns(said["reward"]) if "reward" in said else {}
        for i, rollout in enumerate(sampled.rollouts):
            reward = columns["reward"][i] if "reward" in columns else None
            judged: dict[str, Any] = {"gold": columns["gold"][i]} if "gold" in columns else {}
            if self.cfg.scorers:
                judged["scores"] = {spec: columns[f"scores/{spec}"][i] for spec in self.cfg.scorers}
            of_terms = parts_at(parts, i)
            row = generated_row(rollout, i % sampled.samples, reward, of_terms, tokens[i], JUDGED)
            whose = {"policy": referenced(name), "temperature": temperature}
            self.lines.append({**whose, **row, **judged})

    def knows(
        self, entrant: Entrant, policy: Policy, unseen: dict[str, list[Tokens]], bench: Bench
    ) -> Figures:
        """Held-out losses and right answers: what alignment may have cost.

        Args:
            unseen: what losses are measured on, by their names.
        """
        figures: Figures = {}
        if not entrant.is_plain:  # its weights are those of a policy that is asked plainly
            return figures
        own = {
            each: losses_of(policy.model, rows, self.cfg.hardware)
            for each, rows in unseen.items()
            if rows
        }
        self._losses[entrant.name] = own
        for each in unseen:
            figures |= mean_loss(each, own.get(each))
        if bench.questions:
            right = right_answers(bench.questions, policy, self.cfg)
            self._right[entrant.name] = right
            figures["choices"] = vars(clustered_mean(right))
        return figures

    def report(self, bench: Bench) -> dict[str, Any]:
        """All that report.json has.

        Raises:
            RunError: a judge has scored nothing.
        """
        for judge, reward in bench.judges.items():
            said = [sampled.said[judge].total for sampled in self._every]
            reward.check_scored(judge, torch.cat(said))
        for contest in self.contests.values():
            if bench.references is not None:
                contest.scores[REFERENCES] = bench.references.decisive
        cfg, main = self.cfg, self.contests[self.cfg.algo.temperature]
        anchor = anchor_of(cfg, self.names)
        return {
            "policies": self.over_reference(),
            "frontier": frontier_of(
                self.results, cfg.reference, self.bounds, {"reward": cfg.reward, "gold": cfg.gold}
            ),
            **won_by(main, self.names),
            "head_to_heads": main.head_to_heads(),
            "ratings": main.rated(anchor, derived_seed(cfg.seed, "ratings")),
            "anchor": anchor,
            "by_temperature": {
                f"{temperature:g}": won_by(self.contests[temperature], self.names)
                for temperature in sorted(self.contests)
                if len(self.contests) > 1
            },
            "enumerated": self.bounds,
            "references": figures_of(bench.references, {}) if bench.references else None,
            "choices_by_chance": by_chance(bench.questions) if bench.questions else None,
            "prompts": len(bench.prompts),
            **settings(cfg),
            "reward_model": bench.judgement,
        }

    def over_reference(self) -> dict[str, Figures]:
        """The figures of each policy, and by how much they differ from those of the reference."""
        base = str(Path(self.cfg.reference)) if self.cfg.reference else ""
        if base not in self.results:
            return self.results
        gains = {
            judge: Contest(
                self.cfg.algo.tie, {name: each.of(judge) for name, each in self._main.items()}
            ).gains(base)
            for judge in self._main[base].said
        }
        decides = gains.pop(self._main[base].decides)
        changed: dict[str, Figures] = {}
        for name, figures in self.results.items():
            changes: Figures = {"gain_over_reference": decides[name]}
            changes |= {f"{judge}_gain": of_judge[name] for judge, of_judge in gains.items()}
            for each, losses in self._losses.get(name, {}).items():
                changes[f"{each}_change"] = change_of(losses, self._losses[base][each])
            if name in self._right:
                difference = paired_difference(self._right[name], self._right[base])
                changes["choices_change"] = vars(difference)
            changed[name] = {**figures, **changes}
        return changed


def won_by(contest: Contest, names: list[str]) -> dict[str, dict[str, Figures]]:
    """Win rates of the policy against each baseline, and of all against the references."""
    has_references = REFERENCES in contest.scores
    return {
        "win_rates": contest.win_rates(names[0], names[1:]),
        "against_references": contest.against(REFERENCES, names) if has_references else {},
    }


def anchor_of(cfg: EvaluateConfig, names: list[str]) -> str:
    """The policy whose rating is 0: the one that the config names, the reference, or the last."""
    named = cfg.anchor or cfg.reference
    return str(Path(named)) if named and str(Path(named)) in names else names[-1]


def text_of(rollout: Rollout) -> Text:
    """A response as a judge sees it."""
    return Text(rollout.text, len(rollout.tokens.response))


def settings(cfg: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "samples": cfg.algo.samples,
        "temperature": cfg.algo.temperature,
        "reward": cfg.reward,
        "gold": cfg.gold,
        "scorers": cfg.scorers,
        "reference": cfg.reference,
    }
