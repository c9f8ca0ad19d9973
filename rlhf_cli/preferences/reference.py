"""The reference of preference losses: where it comes from, and its log-probs, kept on disk."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import DpoConfig, FrozenModel, Hardware
from rlhf_cli.config.stages import stage_name
from rlhf_cli.data.batches import cut
from rlhf_cli.data.order import EpochBatches
from rlhf_cli.data.tokens import Answers, Tokens
from rlhf_cli.folders.files import (
    as_umask_says,
    disk_fault,
    library_errors,
    seal_whole,
    whole_folder,
)
from rlhf_cli.folders.integrity import fault_in
from rlhf_cli.folders.manifest import content_hash, read_manifest
from rlhf_cli.models.forward import response_nll
from rlhf_cli.models.load import (
    check_vocabulary,
    load_policy,
    load_weights,
    save_model,
    set_stop_ids,
)
from rlhf_cli.models.out_of_memory import keys_that_help
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.runs.policy import Policy
from rlhf_cli.runs.session import Session
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer

BOOTSTRAP = "bootstrap"


def bootstrap(session: Session, policy: Policy, chosen: list[Tokens]) -> None:
    """SFT of the policy on chosen responses, kept as `out/bootstrap`, a policy folder.

    Where no SFT model exists, DPO starts from this maximum-likelihood fit, policy and reference
    alike (2305.18290 sec. 4, "DPO outline"). A folder that is there already is loaded.
    """
    cfg: Any = session.cfg
    if not chosen:
        raise UserError("reference=bootstrap imitates chosen responses, but no row has one")
    session.claim()
    folder = session.out / BOOTSTRAP
    if folder.is_dir():
        fault = fault_in(folder, (read_manifest(folder) or {}).get("files", {}))
        if fault is None:
            load_weights(policy.model, str(folder), cfg.model)
            return
        say(f"{fault}; the bootstrap is made again")
    algo = cfg.algo
    epochs = algo.bootstrap_epochs or 1
    steps = math.ceil(len(chosen) / algo.batch_size) * epochs
    optimizer = Optimizer({"policy": (policy.model, algo.bootstrap_lr or algo.lr)}, algo, steps)

    def loss(sequences: list[Tokens]) -> Loss:
        return response_nll(policy.model, sequences, chunk=cfg.hardware.logprob_chunk), {}

    lighter = partial(keys_that_help, cfg.hardware, logits=True, gradient=True)
    say(f"bootstrap: SFT on {len(chosen)} chosen responses, {steps} steps")
    with Bar("bootstrap", steps) as bar:
        for items in EpochBatches(chosen, algo.batch_size, epochs, cfg.seed, "bootstrap"):
            tokens = sum(len(sequence.response) for sequence in items)
            batches = cut(items, cfg.hardware.tokens_per_microbatch)
            metrics = optimizer.step([LossTerm(batches, loss, tokens, keys_that_help=lighter)])
            bar.advance(1, f"loss {metrics['loss']:.3f}")
    set_stop_ids(policy.model, policy.tokenizer, policy.encoder.stop_ids)
    with whole_folder(folder) as part:
        save_model(policy.model, policy.tokenizer, part, merge=False)
        seal_whole(part, {"stage": stage_name(cfg), "kind": "policy"})


@dataclass
class Compared:
    """Responses to one prompt, which a policy is compared with its reference on.

    reference: (K,) log-probs of the responses under the reference, once they are known.
    """

    answers: Answers
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def source(self) -> str:
        """Where the row stands, for messages."""
        return self.answers.source


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
    frozen = FrozenModel(cfg.model.dtype, cfg.model.trust_remote_code)
    check_vocabulary("reference", cfg.reference, frozen, policy.tokenizer)
    return Reference.of(load_policy(cfg.reference, frozen, policy.tokenizer, session.device))


def fill_reference(
    reference: Reference,
    items: Sequence[Compared],
    cfg: DpoConfig,
    share: bool,
    origin: dict[str, str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """The reference's log-probs of all responses, where they are not known yet.

    Args:
        share: whether prompts may be computed once.
        origin: what the reference is, if all log-probs are computed ahead: then they are kept on
            disk.
        advance: told how many items are done.
    """
    unknown = [item for item in items if item.reference is None]
    if not unknown:
        return
    cache, found = None, None
    if cfg.algo.precompute_reference and cfg.reference_cache and origin and is_local(origin):
        answers = [item.answers for item in unknown]
        cache = ReferenceCache(cfg.reference_cache, cfg, origin, answers)
        found = cache.read()
    if found is None:
        with reference.active() as model:
            found = sequence_logprobs(model, unknown, cfg.hardware, share, advance)
        if cache is not None:
            cache.write(found)
    for item, values in zip(unknown, found, strict=True):
        item.reference = values


def sequence_logprobs(
    model: nn.Module,
    items: Sequence[Compared],
    hardware: Hardware,
    share: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """Per item the (K,) log-probs of its responses, summed over tokens; without gradient."""
    answers = [item.answers for item in items]
    of_responses = logprobs_of(model, answers, hardware, share=share, advance=advance)
    sums = torch.stack([each.sum() for each in of_responses])  # (S,)
    return list(sums.split([len(each.responses) for each in answers]))


def known_references(items: Sequence[Compared]) -> Tensor:
    """(S,) log-probs under the reference, item by item."""
    return torch.cat([item.reference for item in items if item.reference is not None])


class ReferenceCache:
    """Log-probs of a reference on disk, so that a second run or a sweep over beta has no pass.

    The file is named after the reference's folder, the token ids of all responses (which rows,
    template, tokenizer and limits make) and the type of matrix products. It holds the hash of the
    reference's weights: one that was written for other weights is stale, and computed again.
    """

    def __init__(
        self, folder: str, cfg: DpoConfig, origin: dict[str, str], answers: list[Answers]
    ) -> None:
        self._counts = [len(each.responses) for each in answers]
        data = hashlib.sha256()
        for each in answers:
            data.update(json.dumps([each.prompt, each.responses]).encode())
        self._key = {
            "reference": origin["hash"],
            "data": data.hexdigest(),
            "template": cfg.data.template,
            "dtype": cfg.model.dtype,
        }
        place = str(Path(cfg.out) / BOOTSTRAP) if origin["kind"] == BOOTSTRAP else origin["path"]
        name = hashlib.sha256(json.dumps({**self._key, "reference": place}).encode()).hexdigest()
        self.file = Path(folder) / f"{name[:16]}.safetensors"

    def read(self) -> list[Tensor] | None:
        """Per item the (K,) log-probs of its responses; None where they must be computed."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as stored:
                key, values = stored.metadata(), stored.get_tensor("logprobs")
            whole = key.pop("values") == digest_of(values)
        except (SafetensorError, KeyError):
            whole = False
        if not whole:
            say(f"{self.file}: damaged; the reference is scored again")
            return None
        if key != self._key or len(values) != sum(self._counts):
            say(f"{self.file}: stale, made with another reference; it is scored again")
            return None
        say(f"reference log-probs: read from {self.file}")
        return list(values.split(self._counts))

    def write(self, values: list[Tensor]) -> None:
        """Keep them, in the order of `read`; a disk that takes no cache is no failure."""
        joined = torch.cat(values)
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")  # a sweep has several
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with library_errors(part):
                save_file({"logprobs": joined}, part, {**self._key, "values": digest_of(joined)})
            as_umask_says(part)
            part.replace(self.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            say(f"note: reference log-probs are not kept: {disk_fault(error) or error}")


def digest_of(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
