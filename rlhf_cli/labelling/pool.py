"""The responses that tasks are made of: sampled from policies or of a file, scored by rewards."""

from typing import Any

from rlhf_cli.data.asked import asked_in, not_asked
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.rows import Split
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.labelling.tasks import Sample, samples_of_file
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.rewards.reward import load_reward
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
            reward = None
            if cfg.reward is not None:
                reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
                reward.check([row for row, _ in prompts], session.require)
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
            scores = None if reward is None else own.scored("reward", reward, rollouts).total
            samples += samples_of(rollouts, path, None if scores is None else scores.tolist())
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


def asked_before(cfg: Any) -> set[str]:
    """The identities of the prompts in the files of `asked`, whose number is said."""
    known = asked_in(cfg.asked)
    if known:
        say(f"{len(known)} prompts of {', '.join(cfg.asked)} are not asked again")
    return known


def given_samples(session: Session) -> list[Sample]:
    """What samples=FILE has of new prompts, scored where a reward is given."""
    cfg: Any = session.cfg
    samples = not_asked(samples_of_file(cfg.samples), asked_before(cfg))
    session.note([])
    session.claim()
    if cfg.reward is None:
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
    reward = load_reward(cfg.reward, cfg, encoder.tokenizer, session.device)
    reward.check(rows, session.require)
    for sample, value in zip(samples, reward.score(rollouts).total.tolist(), strict=True):
        sample.origin["reward"] = None if value != value else value
    return samples


def samples_of(rollouts: Any, policy: str, rewards: list[float] | None) -> list[Sample]:
    """Rollouts of a policy as samples; a reward that is not known is None."""
    samples = []
    for i, each in enumerate(rollouts):
        origin: dict[str, Any] = {
            "policy": policy,
            "finish_reason": each.finish_reason,
            "tokens": len(each.tokens.response),
            "logprob": round(sum(each.logprobs), 4),
        }
        if rewards is not None:
            origin["reward"] = None if rewards[i] != rewards[i] else rewards[i]
        samples.append(Sample(each.row.prompt, each.text, each.row.source, origin))
    return samples
