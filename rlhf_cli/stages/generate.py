"""Sampling: responses to prompts, as JSON lines.

Every usual decoding option, in the order in which transformers applies them: repetition penalty,
minimum length, temperature, top-k, top-p, min-p; or greedy, or beam search. With `reward=` each
sample is scored. Prompts come from data, or from standard input with data.path=-. A line of
samples.jsonl has all that its row says, and comes as it is sampled. With algo.keep_best and
algo.pairs what is best of them becomes rows for sft and dpo; with algo.revisions each is criticised
and revised by principles (constitutional AI, 2212.08073) for sft.

    echo "Once upon a time" | rlhf-cli generate policy=DIR data=rows data.path=- algo.samples=3
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.config.schema.stages import GenerateConfig
from rlhf_cli.config.secrets import referenced
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evaluation.few_shot import as_asked_alone
from rlhf_cli.evaluation.kept import KeptSamples
from rlhf_cli.evaluation.picked import Picked, check_sides
from rlhf_cli.evaluation.revised import Requests, Revised
from rlhf_cli.evaluation.revisers import reviser_of
from rlhf_cli.evaluation.samples import (
    SHOWN,
    clip,
    generated_row,
    known_or_none,
    last_words,
    parts_at,
    term_columns,
)
from rlhf_cli.models.positions import positions_of
from rlhf_cli.ranks.agreement import together
from rlhf_cli.reporting.console import Bar, say, table
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.reporting.terminal import width
from rlhf_cli.rewards.reward import Scores, load_reward
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.begin import begin
from rlhf_cli.runs.out_files import SAMPLES
from rlhf_cli.runs.out_folder import staging
from rlhf_cli.runs.policy import Policy, policy_of
from rlhf_cli.runs.preflight import Plan

AT_ONCE = 2048  # prompts whose responses are in memory; of like length among them sampled together
WIDEST, LEAST = 70, 16  # characters of a text in the table at the end, by what there is room for
BESIDE = 28  # columns of what stands beside a prompt and its response


def run(cfg: GenerateConfig, plan: Plan | None = None) -> Path:
    """Write samples.jsonl; returns `out`."""
    session = begin(cfg, plan)
    if session is None:
        return Path(cfg.out)
    policy = policy_of(session, cfg.policy)
    rows = session.rows.to_answer()
    prompts = policy.encoder.prompts(rows.held_out[: cfg.algo.prompts])
    bare = without_prefix(policy, cfg)
    check_sides(cfg.algo, (row for row, _ in prompts))
    reward = None
    if cfg.reward is not None:
        reward = load_reward(cfg.reward, cfg, policy.tokenizer, session.device)
        reward.check([row for row, _ in prompts], session.require)
    if cfg.algo.revisions:
        Requests.of(cfg)  # a fault of its files is said before anything is sampled
    session.note([*rows.notes, *policy.encoder.report()])
    kept, folder = KeptSamples(session), staging(session.out)
    written, picked, revised = Written(cfg, folder), Picked(cfg.algo, folder), None
    if cfg.algo.revisions:
        reviser = reviser_of(cfg, policy, partial(policy_of, session))
        revised = Revised(cfg, reviser, session.out, folder)
    with Bar("generate", len(prompts) * cfg.algo.samples) as bar:
        for first in range(0, len(prompts), AT_ONCE):
            block = prompts[first : first + AT_ONCE]
            own = kept.of(cfg.policy, block, cfg.algo.samples, first)
            bar.skip(len(own.done) * cfg.algo.samples)
            rollouts = policy.engine.sample(
                block,
                Sampling.of(cfg.algo),
                samples=cfg.algo.samples,
                first=first,
                seed=derived_seed(cfg.seed, "generate"),
                advance=bar.advance,
                kept=own,
            )
            if bare is not None:
                rollouts = as_asked_alone(rollouts, block, cfg.algo.samples, bare)
            scores = None if reward is None else own.scored("reward", reward, rollouts)
            together(partial(written.add, rollouts, cfg.algo.samples, scores))
            rewards = None if scores is None else known_or_none(scores.total)
            together(partial(picked.add, rollouts, cfg.algo.samples, rewards))
            if revised is not None:
                revised.add(rollouts, cfg.algo.samples, first * cfg.algo.samples)
    if reward is not None:
        reward.check_scored("reward", written.rewards())
    made = picked.metrics() | (revised.metrics() if revised is not None else {})
    return session.finish("samples", written.shown() | made)


def without_prefix(policy: Policy, cfg: GenerateConfig) -> Encoder | None:
    """Writes prompts without data.prefix: what is sampled under it is judged and kept without."""
    if cfg.data.prefix is None:
        return None
    encoder = Encoder(policy.tokenizer, cfg.data, positions_of(policy.model))
    encoder.ends_with(policy.stop_ids)
    return encoder


class Written:
    """The samples in the order of their prompts, and their figures; held are the first few."""

    def __init__(self, cfg: GenerateConfig, folder: Path) -> None:
        whose, at = referenced(str(Path(cfg.policy))), cfg.algo.temperature
        self._whose = {"policy": whose, "temperature": at}
        self._file = JsonLines(folder / SAMPLES)
        self._first: list[tuple[object, ...]] = []  # as a table shows them
        self._count = 0
        self._rewards: list[float] = []  # of those that have one
        self._scored = False

    def add(self, rollouts: list[Rollout], samples: int, scores: Scores | None) -> None:
        """Write some more lines.

        Args:
            samples: responses to each prompt.
            scores: what the reward says of them, where one was asked for.
        """
        rewards: list[float | None] = [None] * len(rollouts)
        parts: dict[str, list[float | None]] = {}
        if scores is not None:
            rewards, parts = known_or_none(scores.total), term_columns(scores)
            self._scored = True
        for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
            row = generated_row(rollout, i % samples, reward, parts_at(parts, i))
            # of the row's own columns nothing is rounded
            self._file.append({**self._whose, **row}, digits=None)
            if self._count < SHOWN:
                room = min(WIDEST, max(LEAST, (width() - BESIDE) // 2))
                whole = last_words(rollout.row.prompt), rollout.text
                texts = [clip(" ".join(text.split()), room - len("...")) for text in whole]
                self._first.append((*texts, rollout.finish_reason, reward))
            self._count += 1
        self._rewards += [reward for reward in rewards if reward is not None]

    def rewards(self) -> Tensor:
        """(N,) the rewards of all samples, in no order; NaN where there is none."""
        missing = self._count - len(self._rewards)
        return torch.tensor([*self._rewards, *[math.nan] * missing])

    def shown(self) -> dict[str, float]:
        """Show the first few; returns the figures of all."""
        table("samples", ("prompt", "response", "finish", "reward"), self._first)
        metrics: dict[str, float] = {"samples": self._count}
        if self._scored:
            if known := len(self._rewards):
                metrics["reward"] = math.fsum(self._rewards) / known
            if none := self._count - known:
                metrics["reward_none"] = none / self._count
                say(f"{none} of {self._count} samples have no reward")
        return metrics
