"""Sampling: responses to prompts, as JSON lines.

Every usual decoding option, in the order in which transformers applies them: repetition penalty,
minimum length, temperature, top-k, top-p, min-p; or greedy, or beam search. With `reward=` each
sample is scored. Prompts come from data, or from standard input with data.path=-.

    echo "Once upon a time" | rlhf-cli generate policy=DIR data=jsonl data.path=- algo.samples=3
"""

from pathlib import Path

from rlhf_cli.config.schema import GenerateConfig
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.rows import first_rows, read_split
from rlhf_cli.evaluation.samples import SHOWN, clip, known_or_none, last_words
from rlhf_cli.reporting.console import Bar, say, table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rewards.reward import Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout, respond
from rlhf_cli.runs.out_folder import staging
from rlhf_cli.runs.policy import policy_of
from rlhf_cli.runs.session import Session, begin


def run(cfg: GenerateConfig) -> Path:
    """Write samples.jsonl; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    policy = policy_of(session, cfg.policy)
    rows, notes = prompt_rows(cfg)
    prompts = list(zip(*policy.encoder.prompts(rows[: cfg.algo.prompts]), strict=True))
    session.note(policy.encoder, notes)
    with Bar("generate", len(prompts) * cfg.algo.samples) as bar:
        rollouts = respond(
            policy.model,
            policy.encoder,
            prompts,
            cfg.algo,
            seed=derived_seed(cfg.seed, "generate"),
            stop_ids=policy.stop_ids,
            hardware=cfg.hardware,
            advance=bar.advance,
        )
    scores = None
    if cfg.reward is not None:
        reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
        reward.check([row for row, _ in prompts], session.require)
        scores = reward.score(rollouts)
    return finish(session, rollouts, scores)


def prompt_rows(cfg: GenerateConfig) -> tuple[list[Prompt], list[str]]:
    """All prompts of data.path; of the demo the held-out ones."""
    if cfg.data.path is None:
        split = read_split(cfg.data, Prompt)
        return split.held_out, split.notes
    notes: list[str] = []
    return first_rows(cfg.data, cfg.data.path, Prompt, notes), notes


def finish(session: Session, rollouts: list[Rollout], scores: Scores | None) -> Path:
    """Write the samples and show the first few."""
    session.claim()
    file = JsonLines(staging(session.out) / "samples.jsonl")
    totals: list[float | None] = [None] * len(rollouts)
    parts: dict[str, list[float | None]] = {}
    if scores is not None:
        totals = known_or_none(scores.total)
        if len(scores.parts) > 1:
            parts = {spec: known_or_none(part) for spec, part in scores.parts.items()}
    for i, (rollout, score) in enumerate(zip(rollouts, totals, strict=True)):
        file.append(
            {
                "prompt": rollout.row.prompt,
                "response": rollout.text,
                "prompt_tokens": len(rollout.tokens.prompt),
                "response_tokens": len(rollout.tokens.response),
                "finish_reason": rollout.finish,
                "logprob": sum(rollout.logprobs),
                "score": score,
                **({"parts": {spec: part[i] for spec, part in parts.items()}} if parts else {}),
            }
        )
    shown = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), rollout.finish, score)
        for rollout, score in zip(rollouts[:SHOWN], totals, strict=False)
    ]
    table("samples", ("prompt", "response", "finish", "score"), shown)
    metrics: dict[str, float] = {"samples": len(rollouts)}
    if scores is not None:
        known = scores.total[~scores.total.isnan()]
        if len(known):
            metrics["score"] = known.mean().item()
        if len(known) < len(rollouts):
            metrics["score_none"] = 1 - len(known) / len(rollouts)
            say(f"{len(rollouts) - len(known)} of {len(rollouts)} samples have no score")
    return session.finish("samples", metrics)
