"""Sampling: responses to prompts, as JSON lines.

Every usual decoding option, in the order in which transformers applies them: repetition penalty,
minimum length, temperature, top-k, top-p, min-p; or greedy, or beam search. With `reward=` each
sample is scored. Prompts come from data, or from standard input with data.path=-.

    echo "Once upon a time" | rlhf-cli generate policy=DIR data=rows data.path=- algo.samples=3
"""

from pathlib import Path

from rlhf_cli.config.schema import GenerateConfig
from rlhf_cli.data.order import derived_seed
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.evaluation.samples import (
    SHOWN,
    clip,
    known_or_none,
    last_words,
    parts_at,
    sample_row,
    term_columns,
)
from rlhf_cli.reporting.console import Bar, say, table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rewards.reward import Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.out_folder import SAMPLES, staging
from rlhf_cli.runs.policy import policy_of
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.session import Session, begin


def run(cfg: GenerateConfig, plan: Plan | None = None) -> Path:
    """Write samples.jsonl; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    policy = policy_of(session, cfg.policy)
    rows = session.rows.to_answer()
    prompts = policy.encoder.prompts(rows.held_out[: cfg.algo.prompts])
    reward = None
    if cfg.reward is not None:
        reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
        reward.check([row for row, _ in prompts], session.require)
    policy.encoder.check_lengths()
    session.note([*rows.notes, *policy.encoder.notes()])
    kept = KeptSamples(session).of(cfg.policy, prompts, cfg.algo.samples)
    with Bar("generate", len(prompts) * cfg.algo.samples) as bar:
        bar.skip(len(kept.done) * cfg.algo.samples)
        rollouts = policy.engine.sample(
            prompts,
            Sampling.of(cfg.algo),
            samples=cfg.algo.samples,
            seed=derived_seed(cfg.seed, "generate"),
            advance=bar.advance,
            kept=kept,
        )
    scores = None
    if reward is not None:
        scores = kept.scored("reward", reward, rollouts)
        reward.check_scored("reward", scores.total)
    return finish(session, rollouts, scores)


def finish(session: Session, rollouts: list[Rollout], scores: Scores | None) -> Path:
    """Write the samples and show the first few."""
    file = JsonLines(staging(session.out) / SAMPLES)
    rewards: list[float | None] = [None] * len(rollouts)
    parts: dict[str, list[float | None]] = {}
    if scores is not None:
        rewards, parts = known_or_none(scores.total), term_columns(scores)
    for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        sizes = {
            "prompt_tokens": len(rollout.tokens.prompt),
            "response_tokens": len(rollout.tokens.response),
            "logprob": sum(rollout.logprobs),
        }
        file.append(sample_row(rollout, reward, parts_at(parts, i), **sizes))
    shown = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), rollout.finish_reason, reward)
        for rollout, reward in zip(rollouts[:SHOWN], rewards, strict=False)
    ]
    table("samples", ("prompt", "response", "finish", "reward"), shown)
    metrics: dict[str, float] = {"samples": len(rollouts)}
    if scores is not None:
        known = scores.total[~scores.total.isnan()]
        if len(known):
            metrics["reward"] = known.mean().item()
        if len(known) < len(rollouts):
            metrics["reward_none"] = 1 - len(known) / len(rollouts)
            say(f"{len(rollouts) - len(known)} of {len(rollouts)} samples have no reward")
    return session.finish("samples", metrics)
