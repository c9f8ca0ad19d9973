"""Sampling: responses to prompts, as JSON lines.

Every usual decoding option, in the order in which transformers applies them: repetition penalty,
minimum length, temperature, top-k, top-p, min-p; or greedy, or beam search. With `reward=` each
sample is scored. Prompts come from data, or from standard input with data.path=-.

    echo "Once upon a time" | rlhf-cli generate policy=DIR data=jsonl data.path=- algo.samples=3
"""

from pathlib import Path

from rlhf_cli.config.schema import Generate
from rlhf_cli.data.batches import derived_seed
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.rows import first_rows, read_split
from rlhf_cli.reporting.console import Bar, table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.reporting.samples import SHOWN, clip, last_words
from rlhf_cli.rewards.sources import load_reward
from rlhf_cli.rollout.rollouts import Rollout, respond
from rlhf_cli.training.outfolder import staging
from rlhf_cli.training.roles import load_role
from rlhf_cli.training.session import Session, begin


def run(cfg: Generate) -> Path:
    """Write samples.jsonl; returns `out`."""
    session = begin(cfg)
    if session is None:
        return Path(cfg.out)
    policy = load_role(session, cfg.policy)
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
    scores: list[float | None] = [None] * len(rollouts)
    if cfg.reward is not None:
        reward = load_reward(cfg.reward, cfg.model, policy.tokenizer, cfg.hardware, session.device)
        reward.check([row for row, _ in prompts], session.require)
        scores = list(reward.score(rollouts))
    return finish(session, rollouts, scores)


def prompt_rows(cfg: Generate) -> tuple[list[Prompt], list[str]]:
    """All prompts of data.path; of the demo the held-out ones."""
    if cfg.data.path is None:
        split = read_split(cfg.data, Prompt)
        return split.held_out, split.notes
    notes: list[str] = []
    return first_rows(cfg.data, cfg.data.path, Prompt, notes), notes


def finish(session: Session, rollouts: list[Rollout], scores: list[float | None]) -> Path:
    """Write the samples and show the first few."""
    session.claim()
    file = JsonLines(staging(session.out) / "samples.jsonl")
    for rollout, score in zip(rollouts, scores, strict=True):
        file.append(
            {
                "prompt": rollout.row.prompt,
                "response": rollout.text,
                "prompt_tokens": len(rollout.tokens.prompt),
                "response_tokens": len(rollout.tokens.response),
                "finish_reason": rollout.finish,
                "logprob": sum(rollout.logprobs),
                "score": score,
            }
        )
    shown = [
        (clip(last_words(rollout.row.prompt)), clip(rollout.text), rollout.finish, score)
        for rollout, score in zip(rollouts[:SHOWN], scores, strict=False)
    ]
    table("samples", ("prompt", "response", "finish", "score"), shown)
    metrics: dict[str, float] = {"samples": len(rollouts)}
    if scores[0] is not None:
        metrics["score"] = sum(score for score in scores if score is not None) / len(scores)
    return session.finish("samples", metrics)
