"""The reference of preference losses: where it comes from, and its log-probs of responses."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.config.schema.stages import DpoConfig
from rlhf_cli.config.stages import WITHOUT_REFERENCE
from rlhf_cli.data.items import Answers, responses_in
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.order import derived_seed
from rlhf_cli.data.streaming import Stream
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.decoder import matmul_in_float32
from rlhf_cli.models.dtypes import product_type_of
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.tokenizers import check_vocabulary
from rlhf_cli.objectives.kl import k1
from rlhf_cli.preferences.bootstrap import BOOTSTRAP, bootstrap
from rlhf_cli.preferences.cache import ReferenceCache
from rlhf_cli.preferences.items import (
    Compared,
    PreferenceItem,
    PreferenceItems,
    good_sequences,
    with_partners,
)
from rlhf_cli.reporting.console import Bar
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.runs.inherited import longest_sample
from rlhf_cli.runs.policy import Policy, check_reference
from rlhf_cli.runs.session import Session
from rlhf_cli.training.loss_term import Metrics

KL_PROMPTS = 64  # held-out prompts whose sampled responses estimate the KL


def reference_origin(session: Session, cfg: DpoConfig) -> dict[str, str]:
    """What the reference is, for stage.json."""
    if cfg.reference == BOOTSTRAP:
        made = str(session.out / BOOTSTRAP)
        return {"kind": BOOTSTRAP, "path": BOOTSTRAP, "hash": content_hash(made)}
    path = cfg.reference or cfg.policy
    kind = "start" if cfg.reference is None else "folder"
    return {"kind": kind, "path": path, "hash": content_hash(path)}


def is_local(origin: dict[str, str]) -> bool:
    """Whether the hash is that of weights; a hub id may come to mean others."""
    return origin["kind"] == BOOTSTRAP or Path(origin["path"]).is_dir()


def seen_from(out: Path, origin: dict[str, str]) -> str:
    """A local folder as a path from `out`, so that both may move together; a hub id as it is."""
    path = origin["path"]  # of a bootstrap it is one from `out` already
    local = origin["kind"] != BOOTSTRAP and Path(path).is_dir()
    return os.path.relpath(path, out) if local else path


def reference_of(session: Session, policy: Policy, cfg: DpoConfig) -> Reference:
    """The policy as it is now, frozen, or the model of another folder."""
    if cfg.reference is None or cfg.reference == BOOTSTRAP:
        return Reference(policy.model)
    frozen = FrozenModel(cfg.model.dtype, cfg.model.trust_remote_code, cfg.model.attention)
    check_vocabulary("reference", cfg.reference, frozen, policy.tokenizer)
    return Reference.of(load_policy(cfg.reference, frozen, policy.tokenizer, session.device))


class FrozenReference:
    """What a preference loss compares the policy with; a loss without a reference has none.

    origin: what it is, for stage.json; empty where there is none.
    model: None where there is none, or where all of its log-probs are known and it was freed.
    """

    def __init__(
        self,
        session: Session,
        policy: Policy,
        cfg: DpoConfig,
        train: PreferenceItems | Stream[PreferenceItem],
    ) -> None:
        """`train`: whose chosen side reference=bootstrap imitates first, before it is copied."""
        self._cfg = cfg
        if cfg.reference == BOOTSTRAP and not isinstance(train, Stream):
            bootstrap(session, policy, good_sequences(train))
        compares = cfg.algo.loss not in WITHOUT_REFERENCE
        made = cfg.reference == BOOTSTRAP
        self.origin = reference_origin(session, cfg) if compares or made else {}
        self.model = reference_of(session, policy, cfg) if compares else None

    @property
    def is_start(self) -> bool:
        """Whether it is the policy as training starts, so that every first log-ratio is 0."""
        compares = self._cfg.algo.loss not in WITHOUT_REFERENCE
        return compares and self._cfg.reference in (None, BOOTSTRAP)

    def precompute(
        self, train: PreferenceItems | Stream[PreferenceItem], held_out: PreferenceItems
    ) -> list[PreferenceItem]:
        """Score held-out items, and training items where that is worth it, before training.

        With algo.precompute_reference the model is freed then, unless it is the policy's own base.

        Returns:
            The held-out items, with what the reference says of them.
        """
        algo = self._cfg.algo
        if self.model is None:
            return list(held_out)
        # Later epochs batch rows otherwise, which changes the rounding: a resumed run would differ.
        ahead = algo.precompute_reference or algo.epochs > 1
        self._score_ahead(held_out)
        if ahead and not isinstance(train, Stream):
            self._score_ahead(train)
        if algo.precompute_reference and not self.model.switched_off:
            self.model = None  # its memory is free again; eval/kl needs it and is left out
        return list(held_out)

    def _score_ahead(self, side: PreferenceItems) -> None:
        """Score items under a bar; those that are all precomputed are kept on disk."""
        cfg, items = self._cfg, list(side)
        unknown = [item for item in with_partners(items) if item.reference is None]
        with Bar("reference log-probs", len(unknown)) as bar:
            if not unknown:
                return
            cache = None
            if cfg.algo.precompute_reference and cfg.reference_cache and is_local(self.origin):
                assert self.model is not None
                answers = [item.answers for item in unknown]
                dtype = product_type_of(self.model.model)
                cache = ReferenceCache(cfg.reference_cache, cfg, self.origin, answers, dtype)
            known = cache.read() if cache is not None else None
            if known is None:
                known = self._logprobs(unknown, bar.advance)
                if cache is not None:
                    cache.write(known)
        for item, values in zip(unknown, known, strict=True):
            item.reference = values
        for place, item in enumerate(items):
            side.remember(place, item)

    def score(self, items: Sequence[PreferenceItem]) -> None:
        """Fill in the reference's log-probs of items and partners where they are not known yet."""
        unknown = [item for item in with_partners(items) if item.reference is None]
        if self.model is not None and unknown:
            for item, values in zip(unknown, self._logprobs(unknown), strict=True):
                item.reference = values

    def _logprobs(
        self, items: Sequence[Compared], advance: Callable[[int], None] = lambda count: None
    ) -> list[Tensor]:
        assert self.model is not None
        with self.model.active() as model:
            return sequence_logprobs(model, items, self._cfg.hardware, advance)

    def sampled_kl(self, policy: Policy, held_out: Sequence[Answers]) -> float | None:
        """KL(policy || reference) per response in nats, on sampled responses to the first prompts.

        None without a reference model.
        """
        if self.model is None:
            return None
        cfg, sampling = self._cfg, Sampling(longest_sample(self._cfg))
        rows = [item.row for item in held_out[:KL_PROMPTS]]
        questions = [Prompt(row.prompt, row.columns, row.source) for row in rows]
        prompts, seed = policy.encoder.prompts(questions), derived_seed(cfg.seed, "kl")
        policy.engine.update(policy.model)
        rollouts = policy.engine.sample(prompts, sampling, seed=seed)
        sequences = [rollout.tokens for rollout in rollouts]
        ours = logprobs_of(policy.model, sequences, cfg.hardware)
        with self.model.active() as model:
            theirs = logprobs_of(model, sequences, cfg.hardware)
        return k1(torch.cat(ours), torch.cat(theirs)).sum().item() / len(rollouts)

    def check_start(
        self,
        session: Session,
        policy: Policy,
        held_out: Sequence[PreferenceItem],
        before: Metrics,
    ) -> None:
        """Where policy and reference start as one, log-ratios are 0; then DPO's loss is ln 2.

        Args:
            before: the first evaluation.
        """
        algo, hardware = self._cfg.algo, self._cfg.hardware
        gap = log_ratios(policy.model, held_out, hardware).abs().max().item()
        diagnosis = (
            "policy and reference are not the same model: an adapter was not loaded, dropout is "
            "on, or their numerics differ"
        )
        exact = matmul_in_float32(policy.model)
        limit = 0.01 if exact else 1.0
        session.require("max_abs_log_ratio_at_start", gap, gap < limit, diagnosis)
        if algo.loss == "dpo" and not algo.sft_coef:
            limit = 1e-3 if exact else 0.05
            loss, margin = before["eval/loss"], before["eval/rewards/margin"]
            session.require("dpo_loss_at_start", loss, abs(loss - math.log(2)) < limit, diagnosis)
            session.require("dpo_margin_at_start", margin, abs(margin) < limit, diagnosis)

    def check_unchanged(self, session: Session) -> None:
        """The model, where there is one, ends as it began."""
        if self.model is not None:
            check_reference(session, self.model)


def log_ratios(policy: nn.Module, items: Sequence[Compared], hardware: Hardware) -> Tensor:
    """(S,) rho = log pi - log ref of all responses, item by item; without gradient."""
    ours = torch.cat(sequence_logprobs(policy, items, hardware))
    return ours - torch.cat([item.reference for item in items if item.reference is not None])


def sequence_logprobs(
    model: nn.Module,
    items: Sequence[Compared],
    hardware: Hardware,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """Per item the (K,) log-probs of its responses, summed over tokens; without gradient."""
    answers = [item.answers for item in items]
    per_token = logprobs_of(model, answers, hardware, advance=advance)
    sums = torch.stack([each.sum() for each in per_token])  # (S,)
    return list(sums.split([responses_in(item) for item in items]))
