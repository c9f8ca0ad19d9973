"""Evaluation on held-out prompts: one policy beside baselines, judged on the same N x K samples.

Mean reward and gold with a standard error clustered by prompt; KL(policy || reference) per
response, estimated on the samples of the policy itself; held-out loss; head-to-head win rates with
ties and a 95% interval, corrected for their number; ratings of all from all head-to-heads; best of
n, pass@n and maj@n from one set of samples; the health of the text. Where the data has comparisons,
a reward model is judged by them, too. Gold is a scorer that training never saw: a fooled reward
model shows.

    rlhf-cli evaluate policy=runs/demo/ppo baselines='[runs/demo/sft]'
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.held_out import identity
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Demonstration, Preference, Prompt, reply_text
from rlhf_cli.data.reading import KindError
from rlhf_cli.evaluation import judging
from rlhf_cli.evaluation.bench import Bench, responses_at
from rlhf_cli.evaluation.contest import REFERENCES
from rlhf_cli.evaluation.entrants import Entrant, Given, entrants_of, given_samples
from rlhf_cli.evaluation.enumeration import bounds
from rlhf_cli.evaluation.figures import (
    Figures,
    Sampled,
    entropy_of,
    estimated_kl,
    figures_of,
    kls_of_tokens,
    scorers_of,
)
from rlhf_cli.evaluation.findings import Findings, text_of
from rlhf_cli.evaluation.judge_asks import PairJudge, identity_of, judge_of
from rlhf_cli.evaluation.judge_questions import Questions, asked_text
from rlhf_cli.evaluation.pair_judge import (
    Text,
    agreement_with_people,
    agreement_with_scores,
    cost_of,
    judged_pairs,
    judged_report,
)
from rlhf_cli.evaluation.report import show_report, verdict, write_report
from rlhf_cli.evaluation.text_health import text_figures
from rlhf_cli.evaluation.token_values import TokenLines, Values
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.tokenizers import check_vocabulary, load_tokenizer
from rlhf_cli.objectives.subsets import best_of_n_kl_bound
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.encoders import encoder_of
from rlhf_cli.runs.out_folder import staging
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.provenance import siblings_of
from rlhf_cli.runs.session import Session
from rlhf_cli.runs.summary import of_scores


def run(cfg: EvaluateConfig, plan: Plan | None = None) -> Path:
    """Write report.json, samples.jsonl and pictures, and show tables; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    if cfg.judge is not None:
        Questions.of(cfg)  # a fault of its files is said before anything is sampled
    if cfg.samples is None:
        found = Findings(cfg)
        bench = judge_policies(session, found)
    else:
        given = given_samples(cfg.samples)
        found = Findings(as_sampled(cfg, given))
        bench = judge_file(session, found, given)
    report = found.report(bench)
    if cfg.judge is not None:
        report["judge"] = judged_by_model(session, found, bench)
    by_main(lambda: write_report(staging(session.out), cfg, report, found.lines))
    show_report(cfg, report)
    if bench.judgement is not None and bench.scorer is not None:
        say(of_scores(judging.figures(bench.judgement), f"scores of {bench.scorer.path}"))
    shown = {name: report[name] for name in ("policies", "win_rates", "ratings")}
    return session.finish("report", shown, verdict(cfg, report["policies"]))


def judge_policies(session: Session, found: Findings) -> Bench:
    """Each policy on the same held-out prompts, at each temperature."""
    cfg = found.cfg
    rows = session.rows.held_out(Prompt)
    held_out = unique_prompts(rows.held_out)[: cfg.algo.prompts]
    entrants = entrants_of(cfg, session.rows)
    check_tokens(cfg, [entrant.path for entrant in entrants])
    reference = policy_of(session, cfg.reference) if cfg.reference else None
    bench: Bench | None = None
    total = sum(responses_at(cfg, each, t) for each in entrants for t in found.contests)
    with Bar("evaluate", len(held_out) * total) as bar:
        for entrant in entrants:
            policy = policy_of(session, entrant.path)
            if bench is None:
                prompts = policy.encoder.prompts(held_out)
                bench = Bench.of(session, policy.encoder, prompts, rows.notes)
            for temperature in found.contests:
                sampled = bench.answered(entrant, policy, temperature, bar)
                main = temperature == cfg.algo.temperature
                kls = token_kls(cfg, entrant, policy, reference, sampled) if main else None
                told = told_of_tokens(policy, sampled, kls)
                found.add(entrant.name, sampled, temperature, told)
                if main:
                    found.results[entrant.name] = {
                        "seconds": (read_manifest(entrant.path) or {}).get("seconds"),
                        **figures_by(bench, sampled),
                        **with_model(cfg, entrant, sampled, kls),
                        **found.knows(entrant, policy, held_out_sequences(session, policy), bench),
                    }
    assert bench is not None  # there is a policy
    if cfg.algo.enumerate:
        assert reference is not None and cfg.reference is not None  # validate() asks for it
        found.bounds = bounds(bench, reference, cfg.reference)
    return bench


def as_sampled(cfg: EvaluateConfig, given: Given) -> EvaluateConfig:
    """A config as it would have sampled what a file has."""
    told: Any = {"samples": given.samples, "temperature": given.temperature}
    return replace(cfg, algo=replace(cfg.algo, **told))


def judge_file(session: Session, found: Findings, given: Given) -> Bench:
    """The responses that samples=FILE has; no model is loaded but those that judge.

    Raises:
        UserError: prompts are dropped that the file has answers to.
    """
    cfg, encoder = found.cfg, encoder_of(found.cfg, session.rows)
    found.names = list(given.responses)
    prompts = encoder.prompts(given.prompts)
    if len(prompts) < len(given.prompts):
        raise UserError(
            f"samples={cfg.samples}: data.long_prompts=drop leaves {len(prompts)} of "
            f"{len(given.prompts)} prompts; set it to cut"
        )
    bench = Bench.of(session, encoder, prompts, [])
    for name in found.names:
        sampled = bench.given(name, given.rollouts(name, encoder))
        found.add(name, sampled, cfg.algo.temperature, [{}] * len(sampled.rollouts))
        found.results[name] = figures_by(bench, sampled)
    return bench


def judged_by_model(session: Session, found: Findings, bench: Bench) -> Figures:
    """What a language model says of responses of the policy beside those of all others, and how far
    it agrees with people and with the scorer that decides.
    """
    cfg, texts = found.cfg, dict(found.read)
    if bench.references is not None:
        rollouts = iter(bench.references.rollouts)
        texts[REFERENCES] = [
            [] if text is None else [text_of(next(rollouts))] for text in bench.texts
        ]
    judge = judge_of(cfg, lambda path: policy_of(session, path))
    prompts = [asked_text(row.prompt) for row, _ in bench.prompts]
    ours = found.names[0]
    judged, pairs = judged_report(judge, prompts, texts, ours, cfg.judge_tie)
    scores = found.contests[cfg.algo.temperature].scores
    agrees = {
        "people": asked_of_people(judge, session, cfg),
        "gold" if "gold" in bench.judges else "reward": agreement_with_scores(
            pairs, scores[ours], scores, cfg.judge_tie
        ),
    }
    cost = cost_of(judge.counts, cfg.judge_prices)
    return {**identity_of(cfg), **judged, "agreement": agrees, **cost}


def asked_of_people(judge: PairJudge, session: Session, cfg: EvaluateConfig) -> Figures | None:
    """How often the judge prefers what people have chosen; None where data has no such rows."""
    rows: list[Preference] = []
    if cfg.judge_rows:
        with suppress(KindError):
            rows = session.rows.held_out(Preference).held_out[: cfg.judge_rows]
    if not rows:
        return None
    prompts = [asked_text(row.prompt) for row in rows]
    sides = [
        [[Text(reply_text(reply), 0)] for reply in replies]
        for replies in ([row.chosen for row in rows], [row.rejected for row in rows])
    ]
    return agreement_with_people(judged_pairs(judge, prompts, *sides), prompts, cfg.judge_tie)


def figures_by(bench: Bench, sampled: Sampled) -> Figures:
    """What the samples of a policy tell."""
    return {
        **figures_of(sampled, scorers_of(bench.cfg)),
        "text": text_figures(sampled, bench.texts, bench.seen),
    }


def tells(cfg: EvaluateConfig, entrant: Entrant) -> bool:
    """Whether the log-probs of a policy are those by which it was asked."""
    return Sampling.of(cfg.algo).unfiltered and entrant.shots is None


def token_kls(
    cfg: EvaluateConfig,
    entrant: Entrant,
    policy: Policy,
    reference: Policy | None,
    sampled: Sampled,
) -> list[Tensor] | None:
    """Of each response the KLs of its tokens; None where they would be no estimate.

    Unbiased for samples of the unfiltered policy only, so there are none under top-k and the like.
    """
    if reference is None or not tells(cfg, entrant):
        return None
    return kls_of_tokens(cfg, policy, reference, sampled.rollouts)


def told_of_tokens(
    policy: Policy, sampled: Sampled, kls: list[Tensor] | None
) -> list[dict[str, object]]:
    """What lines say of each response: its KL, and of the first one to each prompt its tokens."""
    step, count = sampled.samples, len(sampled.rollouts)
    values: list[Values] = [{"kls": None if kls is None else kls[i]} for i in range(0, count, step)]
    lines = TokenLines(policy.tokenizer).of(sampled.rollouts[::step], values)
    whole = [{} if kls is None else {"kl": kls[i].sum().item()} for i in range(count)]
    return [whole[i] | (lines[i // step] if i % step == 0 else {}) for i in range(count)]


def with_model(
    cfg: EvaluateConfig, entrant: Entrant, sampled: Sampled, kls: list[Tensor] | None
) -> Figures:
    """What its log-probs tell; nothing where it was asked otherwise than they would say.

    Of the best of n they tell how far the chosen ones are from the reference, beside what choosing
    is at most away from the policy.
    """
    figures: Figures = {}
    if tells(cfg, entrant) and entrant.is_plain:
        figures["entropy"] = entropy_of(sampled.rollouts, sampled.samples)
    if kls is not None:
        moved = estimated_kl(kls, sampled.samples)
        if entrant.is_plain:
            figures["kl"] = moved
        else:
            bound = best_of_n_kl_bound(entrant.best_of)
            figures["kl_bound"] = {**moved, "mean": bound + moved["mean"]}
    return figures


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
        "text_loss": list(session.data.texts(policy.encoder).held_out),
        "demonstration_loss": policy.encoder.demonstrations(demonstrations),
    }
