"""Evaluation on held-out prompts: one policy beside baselines, judged on the same N x K samples.

Mean reward and gold with a standard error clustered by prompt; KL(policy || reference) per
response, estimated on the samples of the policy itself; held-out loss; head-to-head win rates with
ties and a 95% interval, corrected for their number; ratings of all from all head-to-heads; best of
n, pass@n and maj@n from one set of samples; the health of the text. Where the data has comparisons,
a reward model is judged by them, too. Gold is a scorer that training never saw: a fooled reward
model shows.

    rlhf-cli evaluate policy=runs/demo/ppo baselines='[runs/demo/sft]'
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Demonstration, Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.evaluation import judging
from rlhf_cli.evaluation.bench import Bench, samples_at
from rlhf_cli.evaluation.choices import by_chance, right_answers
from rlhf_cli.evaluation.contest import REFERENCES, Contest
from rlhf_cli.evaluation.entrants import Entrant, entrants_of, given_samples
from rlhf_cli.evaluation.figures import (
    Figures,
    Sampled,
    change_of,
    entropy_of,
    estimated_kl,
    figures_of,
    losses_of,
    mean_loss,
)
from rlhf_cli.evaluation.frontier import frontier_of
from rlhf_cli.evaluation.judge_asks import asked_text, identity_of, judge_of
from rlhf_cli.evaluation.pair_judge import Text, cost_of, judged_report
from rlhf_cli.evaluation.report import show_report, verdict, write_report
from rlhf_cli.evaluation.samples import generated_row, known_or_none, parts_at, term_columns
from rlhf_cli.evaluation.text_health import text_figures
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.tokenizers import check_vocabulary, load_tokenizer
from rlhf_cli.objectives.comparisons import paired_difference
from rlhf_cli.objectives.estimates import clustered_mean
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.encoders import encoder_of
from rlhf_cli.runs.out_folder import staging
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.provenance import siblings_of
from rlhf_cli.runs.session import Session, begin
from rlhf_cli.runs.summary import of_scores


def run(cfg: EvaluateConfig, plan: Plan | None = None) -> Path:
    """Write report.json, samples.jsonl and pictures, and show tables; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    found = Findings(cfg)
    bench = judge_file(session, found) if cfg.samples else judge_policies(session, found)
    report = found.report(bench)
    if cfg.judge is not None:
        report["judge"] = judged_by_model(session, found, bench)
    by_main(lambda: write_report(staging(session.out), cfg, report, found.lines))
    show_report(cfg, report)
    if bench.judgement is not None and bench.scorer is not None:
        say(of_scores(judging.figures(bench.judgement), f"scores of {bench.scorer.path}"))
    shown = {name: report[name] for name in ("policies", "win_rates", "ratings")}
    return session.finish("report", shown, verdict(cfg, report["policies"]))


def judge_policies(session: Session, found: "Findings") -> Bench:
    """Each policy on the same held-out prompts, at each temperature."""
    cfg = found.cfg
    rows = session.rows.held_out(Prompt)
    held_out = unique_prompts(rows.held_out)[: cfg.algo.prompts]
    entrants = entrants_of(cfg, session.rows)
    check_tokens(cfg, [entrant.path for entrant in entrants])
    reference = policy_of(session, cfg.reference) if cfg.reference else None
    bench: Bench | None = None
    total = sum(samples_at(cfg, temperature) for temperature in found.contests)
    with Bar("evaluate", len(entrants) * len(held_out) * total) as bar:
        for entrant in entrants:
            policy = policy_of(session, entrant.path)
            if bench is None:
                prompts = policy.encoder.prompts(held_out)
                bench = Bench.of(session, policy.encoder, prompts, rows.notes)
            for temperature in found.contests:
                sampled = bench.answered(entrant, policy, temperature, bar)
                found.add(entrant.name, sampled, temperature)
                if temperature == cfg.algo.temperature:
                    found.results[entrant.name] = {
                        "seconds": (read_manifest(entrant.path) or {}).get("seconds"),
                        **figures_by(bench, sampled),
                        **with_model(cfg, entrant, policy, reference, sampled),
                        **found.knows(entrant, policy, held_out_sequences(session, policy), bench),
                    }
    assert bench is not None  # there is a policy
    return bench


def judge_file(session: Session, found: "Findings") -> Bench:
    """The responses that samples=FILE has; no model is loaded but those that judge."""
    cfg = found.cfg
    assert cfg.samples is not None
    given, encoder = given_samples(cfg.samples), encoder_of(cfg, session.rows)
    found.names = list(given.responses)
    bench = Bench.of(session, encoder, encoder.prompts(given.prompts), [])
    for name in found.names:
        sampled = bench.given(name, given.rollouts(name, encoder))
        found.add(name, sampled, cfg.algo.temperature)
        found.results[name] = figures_by(bench, sampled)
    return bench


def judged_by_model(session: Session, found: "Findings", bench: Bench) -> Figures:
    """What a language model says of the first response of the policy beside those of all others."""
    cfg, texts = found.cfg, dict(found.first)
    if bench.references is not None:
        rollouts = iter(bench.references.rollouts)
        texts[REFERENCES] = [
            None if text is None else text_of(next(rollouts)) for text in bench.texts
        ]
    judge = judge_of(cfg, lambda path: policy_of(session, path))
    prompts = [asked_text(row.prompt) for row, _ in bench.prompts]
    judged = judged_report(judge, prompts, texts, found.names[0], cfg.judge_tie)
    return {**identity_of(cfg), **judged, **cost_of(judge.counts, cfg.judge_prices)}


def text_of(rollout: Rollout) -> Text:
    """A response as a judge sees it."""
    return Text(rollout.text, len(rollout.tokens.response))


def figures_by(bench: Bench, sampled: Sampled) -> Figures:
    """What the samples of a policy tell."""
    specs = {"reward": bench.cfg.reward, "gold": bench.cfg.gold}
    named = {name: spec for name, spec in specs.items() if spec is not None}
    return {
        **figures_of(sampled, named),
        "text": text_figures(sampled, bench.texts, bench.seen),
    }


def with_model(
    cfg: EvaluateConfig,
    entrant: Entrant,
    policy: Policy,
    reference: Policy | None,
    sampled: Sampled,
) -> Figures:
    """What its log-probs tell; nothing where it was asked otherwise than they would say."""
    figures: Figures = {}
    if Sampling.of(cfg.algo).unfiltered and entrant.shots is None:
        figures["entropy"] = entropy_of(sampled.rollouts, sampled.samples)
        if reference is not None:
            figures["kl"] = estimated_kl(cfg, policy, reference, sampled.rollouts)
    return figures


@dataclass
class Findings:
    """What has been found of each policy, and in the end the report.

    names: of the policies, the one that is judged first.
    contests: the scores of all, by temperature.
    results: the figures of each.
    first: the first response of each to each prompt, for a judge that reads them.
    lines: of samples.jsonl: what each wrote, and what each judge says of it.
    """

    cfg: EvaluateConfig
    names: list[str] = field(default_factory=list)
    contests: dict[float, Contest] = field(default_factory=dict)
    results: dict[str, Figures] = field(default_factory=dict)
    first: dict[str, list[Text | None]] = field(default_factory=dict)
    lines: list[dict[str, object]] = field(default_factory=list)
    _every: list[Sampled] = field(default_factory=list)
    _losses: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    _right: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """At first the temperature of all figures, then those for win rates alone."""
        algo = self.cfg.algo
        for temperature in [algo.temperature, *algo.temperatures]:
            self.contests[temperature] = Contest(algo.tie)

    def add(self, name: str, sampled: Sampled, temperature: float) -> None:
        """All responses of a policy at a temperature, judged."""
        self.names += [name] if name not in self.names else []
        self.contests[temperature].scores[name] = sampled.decisive
        self._every.append(sampled)
        if temperature == self.cfg.algo.temperature:
            self.first[name] = list(map(text_of, sampled.rollouts[:: sampled.samples]))
        said = sampled.said
        columns = {judge: known_or_none(scores.total) for judge, scores in said.items()}
        parts = term_columns(said["reward"]) if "reward" in said else {}
        for i, rollout in enumerate(sampled.rollouts):
            reward = columns["reward"][i] if "reward" in columns else None
            gold = {"gold": columns["gold"][i]} if "gold" in columns else {}
            row = generated_row(rollout, i % sampled.samples, reward, parts_at(parts, i))
            whose = {"policy": referenced(name), "temperature": temperature}
            self.lines.append({**whose, **row, **gold})

    def knows(
        self, entrant: Entrant, policy: Policy, unseen: dict[str, list[Tokens]], bench: Bench
    ) -> Figures:
        """Held-out losses and right answers: what alignment may have cost.

        Args:
            unseen: what losses are measured on, by their names.
        """
        figures: Figures = {}
        if entrant.shots is not None:  # its weights are those of a policy without demonstrations
            return figures
        own = {each: losses_of(policy, rows, self.cfg) for each, rows in unseen.items() if rows}
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
            "frontier": frontier_of(self.results, cfg.reference),
            **won_by(main, self.names),
            "ratings": main.rated(anchor, derived_seed(cfg.seed, "ratings")),
            "anchor": anchor,
            "by_temperature": {
                f"{temperature:g}": won_by(self.contests[temperature], self.names)
                for temperature in sorted(self.contests)
                if len(self.contests) > 1
            },
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
        scores = self.contests[self.cfg.algo.temperature].scores
        ours = Contest(self.cfg.algo.tie, {name: scores[name] for name in self.names})
        gains = ours.gains(base)
        changed: dict[str, Figures] = {}
        for name, figures in self.results.items():
            changes: Figures = {"gain_over_reference": gains[name]}
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


def check_tokens(cfg: EvaluateConfig, paths: list[str]) -> None:
    """All policies, and the reference, read the same tokens: ids are compared and scored as such.

    Raises:
        UserError: naming the one that does not.
    """
    tokenizer = load_tokenizer(cfg.policy, cfg.model)
    for path in paths[1:]:
        check_vocabulary("baseline", path, cfg.model, tokenizer)
    if cfg.reference:
        check_vocabulary("reference", cfg.reference, cfg.model, tokenizer)
    if cfg.baselines is None:
        for path in siblings_of(cfg.policy, alike=False):
            say(f"note: {path} has another tokenizer than policy={cfg.policy} and is left out")


def unique_prompts(rows: list[Prompt]) -> list[Prompt]:
    """Each prompt once: several pairs of one prompt are not several prompts to judge by."""
    return list({identity(row): row for row in reversed(rows)}.values())[::-1]


def held_out_sequences(session: Session, policy: Policy) -> dict[str, list[Tokens]]:
    """What held-out losses are measured on: plain text and demonstrations, where data has them."""
    demonstrations = []
    if session.cfg.data.format not in ("rows", "verl"):  # these may be prompts alone
        demonstrations = session.rows.held_out(Demonstration).held_out
    return {
        "text_loss": list(session.texts(policy.encoder).held_out),
        "demonstration_loss": policy.encoder.demonstrations(demonstrations),
    }


def settings(cfg: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "samples": cfg.algo.samples,
        "temperature": cfg.algo.temperature,
        "reward": cfg.reward,
        "gold": cfg.gold,
        "reference": cfg.reference,
    }
