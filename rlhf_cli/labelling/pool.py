"""The responses that tasks are made of: sampled from policies or of a file, scored by rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import LabelConfig
from rlhf_cli.config.selection_rules import BY_SCORES, FEWEST, REWARD, choosers
from rlhf_cli.data.asked import not_asked
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.rows import Split
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.labelling.selection import score_of
from rlhf_cli.labelling.tasks import STEPS, Sample, asked_before, new_samples
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rewards.reward import Reward, Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.encoders import encoder_of
from rlhf_cli.runs.policy import policy_of
from rlhf_cli.runs.session import Session


def sampled(session: Session) -> list[Sample]:
    """Responses of each policy to the same new prompts, scored where a reward is given."""
    cfg: Any = session.cfg
    rows, kept, samples = prompts_of(session), None, []
    policies = [cfg.policy, *cfg.baselines]
    asked = not_asked(rows.held_out, asked_before(cfg))[: cfg.algo.prompts]
    with Bar("label", len(asked) * cfg.algo.samples * len(policies)) as bar:
        for path in policies:
            policy = policy_of(session, path)
            prompts = policy.encoder.prompts(asked)
            judges = load_judges(session, policy.tokenizer, [row for row, _ in prompts])
            if kept is None:
                session.note([*rows.notes, *policy.encoder.report()])
                kept = KeptSamples(session)
            own = kept.of(path, prompts, cfg.algo.samples)
            bar.skip(len(own.done) * cfg.algo.samples)
            rollouts = policy.engine.sample(
                prompts,
                Sampling.of(cfg.algo),
                samples=cfg.algo.samples,
                seed=derived_seed(cfg.seed, "label", path),
                advance=bar.advance,
                kept=own,
            )
            made = [sample_of(rollout, path) for rollout in rollouts]
            samples += judged(cfg, made, judges, rollouts, own.scored)
    return samples


def prompts_of(session: Session) -> Split:
    """The prompts whose responses are labelled: all, but of the demo those to learn from.

    What is labelled is learnt from, and the demo's other prompts are what policies are judged by.
    Of rows of a user's it is their hash that keeps the two apart, in every stage alike.
    """
    if session.cfg.data.format == "demo":
        known = session.rows.split(Prompt)
        return Split([], known.train, known.notes)
    return session.rows.to_answer()


def given_samples(session: Session) -> list[Sample]:
    """What samples=FILE has of new prompts, scored where rewards are given."""
    cfg: Any = session.cfg
    samples = new_samples(cfg)
    session.note([])
    session.claim()
    if cfg.reward is None and not cfg.scorers:
        return samples
    encoder = encoder_of(cfg, session.rows)
    rows = [Prompt(each.prompt, each.columns, each.source) for each in samples]
    reasons = [str(each.origin.get("finish_reason", "eos")) for each in samples]
    texts, ended = [each.text for each in samples], [each != "length" for each in reasons]
    tokens = encoder.written(rows, texts, ended)
    rollouts = [
        Rollout(row, ids, [], reason, text)
        for row, ids, reason, text in zip(rows, tokens, reasons, texts, strict=True)
    ]
    judges = load_judges(session, encoder.tokenizer, rows)
    return judged(
        *(cfg, samples, judges, rollouts),
        lambda name, judge, read, by_step: judge.score(read, by_step),
    )


def sample_of(rollout: Rollout, policy: str) -> Sample:
    """A rollout of a policy."""
    origin = {
        "policy": policy,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.tokens.response),
        "logprob": round(sum(rollout.logprobs), 4),
    }
    return Sample(rollout.row.prompt, rollout.text, rollout.row.source, origin)


# --------------------------------------------------------------------------- what rewards say


def load_judges(
    session: Session, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt]
) -> dict[str, Reward]:
    """Reward and scorers, as far as the config names them, by their name; they check the rows."""
    cfg: Any = session.cfg
    named = {REWARD: cfg.reward, **{spec: spec for spec in cfg.scorers}}
    judges = {
        name: load_reward(spec, cfg, tokenizer, session.device)
        for name, spec in named.items()
        if spec is not None
    }
    for judge in judges.values():
        judge.check(rows, session.require)
    return judges


def judged(
    cfg: LabelConfig,
    samples: Sequence[Sample],
    judges: Mapping[str, Reward],
    rollouts: Sequence[Rollout],
    score: Callable[[str, Reward, Sequence[Rollout], bool], Scores],
) -> list[Sample]:
    """Samples with what judges say of them; None where one says nothing.

    Args:
        rollouts: the same responses as judges read them.
        score: gives the scores of a judge, by its name, and where asked those of steps.
    """
    by_step = cfg.algo.protocol == STEPS
    scores = {
        name: score(name, judge, rollouts, by_step and name == REWARD)
        for name, judge in judges.items()
    }
    said = {name: each.total.tolist() for name, each in scores.items()}
    steps = scores[REWARD].steps if REWARD in scores else None
    told = []
    for i, sample in enumerate(samples):
        own = {name: None if math.isnan(each[i]) else each[i] for name, each in said.items()}
        reward = {"reward": own.pop(REWARD)} if REWARD in own else {}
        others: dict[str, Any] = {"scores": own} if own else {}
        if steps is not None:
            own_steps = steps[i].tolist()  # infinite where they failed
            others["step_rewards"] = [each if math.isfinite(each) else None for each in own_steps]
        told.append(replace(sample, origin={**sample.origin, **reward, **others}))
    if cfg.algo.select != "fisher":
        return told
    states = judges[choosers(cfg)[0]].response_model.states(rollouts)
    return [
        replace(sample, raw=raw, state=state)
        for sample, (raw, state) in zip(told, states, strict=True)
    ]


def judges_that_know(cfg: LabelConfig, samples: Sequence[Sample]) -> list[str]:
    """The judges by whose scores tasks are chosen; a file of responses need not have rewards.

    Raises:
        UserError: others have no score of any response, or too few are left.
    """
    if cfg.algo.select not in BY_SCORES:
        return []
    named = choosers(cfg)
    known = [
        name for name in named if any(not math.isnan(score_of(each, name)) for each in samples)
    ]
    given = [name for name in named if name != REWARD or cfg.reward is not None]
    if len(known) < FEWEST[cfg.algo.select] or any(name not in known for name in given):
        unknown = next(name for name in named if name not in known)
        raise UserError(
            f"algo.select={cfg.algo.select} chooses by {', '.join(named)}, but no response has a "
            f"score of {unknown}: give reward=... or scorers=[...] that know them"
        )
    return known
