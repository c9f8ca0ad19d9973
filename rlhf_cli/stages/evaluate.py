"""Evaluation on held-out prompts: one policy beside baselines, judged on the same N x K samples.

Mean reward and gold with a standard error clustered by prompt; KL(policy || reference) per
response, estimated on the samples of the policy itself; held-out loss; head-to-head win rates with
ties and a 95% interval. Where the data has comparisons, a reward model is judged by them, too.
Gold is a scorer that training never saw: a fooled reward model shows.

    rlhf-cli evaluate policy=runs/demo/ppo baselines='[runs/demo/sft]'
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, Ranking
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.reading import KindError
from rlhf_cli.evaluation.judging import Report, figures, judge
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.evaluation.report import show_report, verdict
from rlhf_cli.evaluation.samples import known_or_none, parts_at, sample_row, term_columns
from rlhf_cli.folders.files import write_text
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.score import logprobs_of, mean_nll
from rlhf_cli.models.tokenizers import check_vocabulary, load_tokenizer
from rlhf_cli.objectives.estimates import Estimate, clustered_mean, win_rate
from rlhf_cli.objectives.kl import k1
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.reporting.metrics import JsonLines, round_figures
from rlhf_cli.rewards.models import ModelReward
from rlhf_cli.rewards.reward import Reward, Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.out_folder import SAMPLES, staging
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.provenance import baselines_of, siblings_of
from rlhf_cli.runs.session import Session, begin
from rlhf_cli.runs.summary import of_scores

Samples = list[dict[str, object]]


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

    judges: dict[str, Reward] = {}
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, Tensor] = {}
    every: list[dict[str, Scores]] = []
    samples: Samples = []
    with Bar("evaluate", len(paths) * len(held_out) * cfg.algo.samples) as bar:
        for number, path in enumerate(paths):
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
                kept = KeptSamples(session)
            own = kept.of(path, prompts, cfg.algo.samples)
            bar.skip(len(own.done) * cfg.algo.samples)
            rollouts = policy.engine.sample(
                prompts,
                Sampling.of(cfg.algo),
                samples=cfg.algo.samples,
                seed=derived_seed(cfg.seed, "evaluate", number),  # independent responses
                advance=bar.advance,
                kept=own,
            )
            said = {name: own.scored(name, each, rollouts) for name, each in judges.items()}
            every.append(said)
            decisive = said.get("gold") or said["reward"]  # gold decides wins where there is one
            scores[path] = decisive.total.view(-1, cfg.algo.samples)  # (N, K)
            results[path] = result_of(cfg, path, policy, reference, rollouts, said, unseen)
            samples += samples_of(path, rollouts, said)

    check_scored(judges, every)
    wins = compared(cfg, paths, scores, results)
    report = {
        "policies": results,
        "win_rates": wins,
        "prompts": len(prompts),
        **settings(cfg),
        "reward_model": judgement,
    }
    by_main(lambda: write(staging(session.out), report, samples))
    show_report(paths[0], cfg.reference, results, wins)
    if judgement is not None and scorer is not None:
        say(of_scores(figures(judgement), f"scores of {scorer.path}"))
    sentence = verdict(paths[0], cfg.reference, results)
    return session.finish("report", {"policies": results, "win_rates": wins}, sentence)


def check_scored(judges: dict[str, Reward], said: list[dict[str, Scores]]) -> None:
    """Each judge has scored something.

    Args:
        said: what each of them says of the rollouts of each policy.

    Raises:
        RunError: naming the one that has not.
    """
    for name, reward in judges.items():
        reward.check_scored(name, torch.cat([scores[name].total for scores in said]))


def result_of(
    cfg: EvaluateConfig,
    path: str,
    policy: Policy,
    reference: Policy | None,
    rollouts: list[Rollout],
    said: dict[str, Scores],
    unseen: dict[str, list[Tokens]],
) -> dict[str, Any]:
    """The figures of one policy.

    Args:
        said: what each judge says of the rollouts.
        unseen: what its held-out losses are measured on, by their names.
    """
    result: dict[str, Any] = {"seconds": (read_manifest(path) or {}).get("seconds")}
    for name, scores in said.items():
        result |= mean_of_known(name, scores.total.view(-1, cfg.algo.samples))
    if reference is not None and Sampling.of(cfg.algo).unfiltered:
        result["kl"] = estimated_kl(cfg, policy, reference, rollouts)
    for name, sequences in unseen.items():
        nll = mean_nll(policy.model, sequences, cfg.hardware) if sequences else None
        result[name] = nll
    result["length"] = mean_length(rollouts)
    result["ended"] = sum(rollout.ended for rollout in rollouts) / len(rollouts)
    return result


def compared(
    cfg: EvaluateConfig,
    paths: list[str],
    scores: dict[str, Tensor],
    results: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Win rates of the policy against each baseline; gains over the reference go into results.

    Args:
        scores: by policy (N, K), NaN where a response has none; all answer the same prompts.
    """
    base = str(Path(cfg.reference)) if cfg.reference else ""
    if base in scores:
        for path in paths:
            ours, theirs = scored_alike(scores[path], scores[base])
            gain = asdict(clustered_mean(ours - theirs)) if len(ours) else None
            results[path]["gain_over_reference"] = gain
    wins = {}
    for path in paths[1:]:
        ours, theirs = scored_alike(scores[paths[0]], scores[path])
        if len(ours):
            wins[path] = asdict(win_rate(ours, theirs, cfg.algo.tie))
    return wins


def samples_of(path: str, rollouts: list[Rollout], said: dict[str, Scores]) -> Samples:
    """The lines of samples.jsonl of one policy: what it wrote, and what each judge says of it."""
    columns = {name: known_or_none(scores.total) for name, scores in said.items()}
    parts = term_columns(said["reward"]) if "reward" in said else {}
    lines = []
    for i, rollout in enumerate(rollouts):
        reward = columns["reward"][i] if "reward" in columns else None
        gold = {"gold": columns["gold"][i]} if "gold" in columns else {}
        lines.append(
            {"policy": referenced(path), **sample_row(rollout, reward, parts_at(parts, i), **gold)}
        )
    return lines


def write(folder: Path, report: dict[str, Any], samples: Samples) -> None:
    """report.json and samples.jsonl."""
    write_text(
        folder / "report.json", json.dumps(round_figures(referenced(report)), indent=2) + "\n"
    )
    file = JsonLines(folder / SAMPLES)
    for line in samples:
        file.append(line)


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


def mean_of_known(judge: str, values: Tensor) -> dict[str, Any]:
    """The mean over responses that have a reward, and the share of those that have none, if any.

    Args: values (N, K), NaN where there is none.
    """
    per_prompt = values.nanmean(-1, keepdim=True)  # (N, 1)
    known = per_prompt[~per_prompt.isnan().squeeze(-1)]
    figures: dict[str, Any] = {judge: asdict(clustered_mean(known)) if len(known) else None}
    if (share := values.isnan().float().mean().item()) > 0:
        figures[f"{judge}_none"] = share
    return figures


def scored_alike(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts to which every response of both policies has a reward: (N', K) each."""
    known = ~(ours.isnan() | theirs.isnan()).any(-1)
    return ours[known], theirs[known]


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


def estimated_kl(
    cfg: EvaluateConfig, policy: Policy, reference: Policy, rollouts: list[Rollout]
) -> dict[str, float]:
    """KL(policy || reference) per response in nats, both at the sampling temperature.

    Unbiased for samples of the unfiltered policy only, so there is none under top-k and the like.
    """
    sequences = [rollout.tokens for rollout in rollouts]
    temperature = Sampling.of(cfg.algo).scored_at
    ours = logprobs_of(policy.model, sequences, cfg.hardware, temperature)
    theirs = logprobs_of(reference.model, sequences, cfg.hardware, temperature)
    sums = [k1(ours[i], theirs[i]).sum() for i in range(len(sequences))]
    estimate: Estimate = clustered_mean(torch.stack(sums).view(-1, cfg.algo.samples))
    return asdict(estimate)


def held_out_sequences(session: Session, policy: Policy) -> dict[str, list[Tokens]]:
    """What held-out losses are measured on: plain text and demonstrations, where data has them."""
    demonstrations = []
    if session.cfg.data.format not in ("rows", "verl"):  # these may be prompts alone
        demonstrations = session.rows.held_out(Demonstration).held_out
    return {
        "text_loss": list(session.texts(policy.encoder).held_out),
        "demonstration_loss": policy.encoder.demonstrations(demonstrations),
    }


def mean_length(rollouts: list[Rollout]) -> float:
    """Response tokens, EOS included."""
    return sum(len(rollout.tokens.response) for rollout in rollouts) / len(rollouts)


def settings(cfg: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "samples": cfg.algo.samples,
        "temperature": cfg.algo.temperature,
        "reward": cfg.reward,
        "gold": cfg.gold,
        "reference": cfg.reference,
    }
