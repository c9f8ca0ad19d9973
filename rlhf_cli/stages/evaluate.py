"""Evaluation on held-out prompts: one policy beside baselines, judged on the same N x K samples.

Mean reward and gold with a standard error clustered by prompt; KL(policy || reference) per
response, estimated on the samples of the policy itself; held-out loss; head-to-head win rates with
ties and a 95% interval. Where the data has comparisons, a reward model is judged by them, too.
Gold is a scorer that training never saw: a fooled reward model shows.

    rlhf-cli evaluate policy=runs/demo/ppo baselines='[runs/demo/sft]'
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.items import Answers, EncodedPrompt, Tokens
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Ranking
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.reading import KindError
from rlhf_cli.evaluation.contest import REFERENCES, Contest
from rlhf_cli.evaluation.figures import (
    Figures,
    Sampled,
    entropy_of,
    estimated_kl,
    figures_of,
    held_out_loss,
)
from rlhf_cli.evaluation.frontier import frontier_of
from rlhf_cli.evaluation.judging import Report, judge
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.evaluation.references import references_of, scored_references
from rlhf_cli.evaluation.report import show_judgement, show_report, write_report
from rlhf_cli.evaluation.samples import generated_row, known_or_none, parts_at, term_columns
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.tokenizers import check_vocabulary, load_tokenizer
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rewards.models import ModelReward
from rlhf_cli.rewards.reward import Reward, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.out_folder import staging
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.provenance import baselines_of, siblings_of
from rlhf_cli.runs.session import Session, begin


def run(cfg: EvaluateConfig, plan: Plan | None = None) -> Path:
    """Write report.json and samples.jsonl, and show tables; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    rows = session.rows.held_out(Prompt)
    held_out = unique_prompts(rows.held_out)[: cfg.algo.prompts]
    paths = policies(cfg)
    check_tokens(cfg, paths)
    reference = policy_of(session, cfg.reference) if cfg.reference else None

    contests = {temperature: Contest(cfg.algo.tie) for temperature in temperatures(cfg)}
    main = contests[cfg.algo.temperature]
    judges: dict[str, Reward] = {}
    results: dict[str, Figures] = {}
    every: list[Sampled] = []
    total = sum(samples_at(cfg, temperature) for temperature in contests)
    with Bar("evaluate", len(paths) * len(held_out) * total) as bar:
        for path in paths:
            policy = policy_of(session, path)
            prompts = policy.encoder.prompts(held_out)
            unseen = held_out_sequences(session, policy)
            if not judges:
                judges = load_judges(cfg, policy, session)
                for each in judges.values():
                    each.check([row for row, _ in prompts], session.require)
                scorer = model_in(judges.get("reward"))
                judgement = None if scorer is None else judged(session, scorer, policy)
                session.note([*rows.notes, *policy.encoder.report()])
                kept, written = KeptSamples(session), Lines()
                references = referred(session, policy, prompts, judges, kept)
            for temperature, contest in contests.items():
                sampled = answered(cfg, path, temperature, policy, prompts, judges, kept, bar)
                every.append(sampled)
                written.add(path, temperature, sampled)
                contest.scores[path] = sampled.decisive
                if contest is main:
                    results[path] = result_of(cfg, path, policy, reference, sampled, unseen)

    check_scored(judges, every)
    for contest in contests.values():
        if references is not None:
            contest.scores[REFERENCES] = references.decisive
    report = {
        "policies": with_gains(cfg, results, main),
        "frontier": frontier_of(results, cfg.reference),
        **compared(cfg, paths, contests),
        "references": None if references is None else figures_of(references, {}),
        "prompts": len(prompts),
        **settings(cfg),
        "reward_model": judgement,
    }
    by_main(lambda: write_report(staging(session.out), cfg, report, written.lines))
    show_report(cfg, report)
    if judgement is not None and scorer is not None:
        show_judgement(f"{scorer.path} on held-out rows", judgement)
    shown = {name: report[name] for name in ("policies", "win_rates", "ratings")}
    return session.finish("report", shown)


def answered(
    cfg: EvaluateConfig,
    path: str,
    temperature: float,
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    judges: dict[str, Reward],
    kept: KeptSamples,
    bar: Bar,
) -> Sampled:
    """What a policy responds at a temperature, and what each judge says of it.

    Its draws hang on its own path and the temperature: neither the policies beside it nor its place
    among them move a figure of it, and the responses of two policies are independent.
    """
    samples = samples_at(cfg, temperature)
    at = () if temperature == cfg.algo.temperature else (temperature,)
    own = kept.of(path if not at else f"{path} at temperature {temperature:g}", prompts, samples)
    bar.skip(len(own.done) * samples)
    rollouts = policy.engine.sample(
        prompts,
        replace(Sampling.of(cfg.algo), temperature=temperature),
        samples=samples,
        seed=derived_seed(cfg.seed, "evaluate", path, *at),
        advance=bar.advance,
        kept=own,
    )
    said = {name: own.scored(name, each, rollouts) for name, each in judges.items()}
    return Sampled(rollouts, said, samples)


def temperatures(cfg: EvaluateConfig) -> list[float]:
    """Where policies are sampled: first where all figures are, then for win rates alone."""
    return list(dict.fromkeys([cfg.algo.temperature, *cfg.algo.temperatures]))


def samples_at(cfg: EvaluateConfig, temperature: float) -> int:
    """Responses to a prompt: greedy ones beside sampled ones would all be the same."""
    greedy = temperature == 0 and temperature != cfg.algo.temperature
    return 1 if greedy else cfg.algo.samples


def check_scored(judges: dict[str, Reward], every: list[Sampled]) -> None:
    """Each judge has scored something.

    Raises:
        RunError: naming the one that has not.
    """
    for name, reward in judges.items():
        reward.check_scored(name, torch.cat([sampled.said[name].total for sampled in every]))


def result_of(
    cfg: EvaluateConfig,
    path: str,
    policy: Policy,
    reference: Policy | None,
    sampled: Sampled,
    unseen: dict[str, list[Tokens]],
) -> Figures:
    """The figures of one policy.

    Args:
        unseen: what its held-out losses are measured on, by their names.
    """
    result: Figures = {"seconds": (read_manifest(path) or {}).get("seconds")}
    specs = {"reward": cfg.reward, "gold": cfg.gold}
    result |= figures_of(sampled, {name: spec for name, spec in specs.items() if spec is not None})
    if Sampling.of(cfg.algo).unfiltered:
        result["entropy"] = entropy_of(sampled.rollouts, sampled.samples)
        if reference is not None:
            result["kl"] = estimated_kl(cfg, policy, reference, sampled.rollouts)
    for name, sequences in unseen.items():
        result |= held_out_loss(name, policy, sequences, cfg)
    return result


def with_gains(
    cfg: EvaluateConfig, results: dict[str, Figures], contest: Contest
) -> dict[str, Figures]:
    """The same with what each policy gains over the reference, where that is one of them."""
    base = str(Path(cfg.reference)) if cfg.reference else ""
    if base not in results:
        return results
    gains = Contest(contest.tie, {path: contest.scores[path] for path in results}).gains(base)
    return {path: {**each, "gain_over_reference": gains[path]} for path, each in results.items()}


def compared(
    cfg: EvaluateConfig, paths: list[str], contests: dict[float, Contest]
) -> dict[str, Any]:
    """Who wins against whom, and ratings of all; then win rates at each temperature."""
    main = contests[cfg.algo.temperature]
    anchor = anchor_of(cfg, paths)
    return {
        **won_by(main, paths),
        "ratings": main.rated(anchor, derived_seed(cfg.seed, "ratings")),
        "anchor": anchor,
        "by_temperature": {
            f"{temperature:g}": won_by(contests[temperature], paths)
            for temperature in sorted(contests)
            if len(contests) > 1
        },
    }


def won_by(contest: Contest, paths: list[str]) -> dict[str, dict[str, Figures]]:
    """Win rates of the policy against each baseline, and of all against the references."""
    has_references = REFERENCES in contest.scores
    return {
        "win_rates": contest.win_rates(paths[0], paths[1:]),
        "against_references": contest.against(REFERENCES, paths) if has_references else {},
    }


def anchor_of(cfg: EvaluateConfig, paths: list[str]) -> str:
    """The policy whose rating is 0: the one that the config names, the reference, or the last."""
    named = cfg.anchor or cfg.reference
    return str(Path(named)) if named and str(Path(named)) in paths else paths[-1]


@dataclass
class Lines:
    """The lines of samples.jsonl: what each policy wrote, and what each judge says of it."""

    lines: list[dict[str, object]] = field(default_factory=list)

    def add(self, path: str, temperature: float, sampled: Sampled) -> None:
        """All responses of a policy at a temperature."""
        said = sampled.said
        columns = {name: known_or_none(scores.total) for name, scores in said.items()}
        parts = term_columns(said["reward"]) if "reward" in said else {}
        for i, rollout in enumerate(sampled.rollouts):
            reward = columns["reward"][i] if "reward" in columns else None
            gold = {"gold": columns["gold"][i]} if "gold" in columns else {}
            row = generated_row(rollout, i % sampled.samples, reward, parts_at(parts, i))
            whose = {"policy": referenced(path), "temperature": temperature}
            self.lines.append({**whose, **row, **gold})


def policies(cfg: EvaluateConfig) -> list[str]:
    """The policy, then its baselines: those given, or the finished policies beside it."""
    return list(dict.fromkeys(str(Path(path)) for path in [cfg.policy, *baselines_of(cfg)]))


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


def load_judges(cfg: EvaluateConfig, policy: Policy, session: Session) -> dict[str, Reward]:
    """Reward, then gold, as far as the config names them."""
    specs = {"reward": cfg.reward, "gold": cfg.gold}
    return {
        name: load_reward(spec, cfg, policy.tokenizer, session.device)
        for name, spec in specs.items()
        if spec is not None
    }


def referred(
    session: Session,
    policy: Policy,
    prompts: list[EncodedPrompt],
    judges: dict[str, Reward],
    kept: KeptSamples,
) -> Sampled | None:
    """The responses that the data has, judged; None where it has none."""
    texts = references_of(prompts, session.rows)
    return scored_references(texts, prompts, policy.encoder, judges, kept)


def model_in(reward: Reward | None) -> ModelReward | None:
    """The first model among the terms of a reward, which held-out rows judge."""
    sources = [term.source for term in reward.terms] if reward is not None else []
    return next((source for source in sources if isinstance(source, ModelReward)), None)


def judged(session: Session, source: ModelReward, policy: Policy) -> Report | None:
    """How a reward model orders held-out pairs, or rankings; None without either."""
    for kind in (Preference, Ranking):
        with suppress(KindError):
            items = policy.encoder.answers(session.rows.held_out(kind).held_out)
            written = [rollout for item in items for rollout in as_rollouts(item, policy)]
            scores = source.raw_of(written).split([len(item.responses) for item in items])
            scored = [pair for pair in zip(items, scores, strict=True) if pair[1].isfinite().all()]
            if scored:
                return judge([item for item, _ in scored], [each for _, each in scored])
    return None


def as_rollouts(item: Answers, policy: Policy) -> list[Rollout]:
    """The responses of a row as if the policy had written them."""
    row = Prompt(item.row.prompt, item.row.columns, item.row.source)
    return [
        Rollout(
            row,
            sequence,
            [],
            "eos" if sequence.response[-1] in policy.encoder.stop_ids else "length",
            policy.encoder.text(sequence.response),
        )
        for sequence in item.sequences
    ]


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
