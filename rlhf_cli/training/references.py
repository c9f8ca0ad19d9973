"""Where a reference comes from when it is not simply loaded: bootstrapped, or read from a cache."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_cli.config.schema import Dpo
from rlhf_cli.data.batches import collate, cut, epochs_of
from rlhf_cli.data.tokens import Answers, Tokens
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.load import load_weights, save_model, set_stop_ids
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.reporting.console import Bar, say
from rlhf_cli.training.optimize import Loss, Optimizer, Part
from rlhf_cli.training.outfolder import aside, move_into_place
from rlhf_cli.training.roles import Policy
from rlhf_cli.training.session import Session

BOOTSTRAP = "bootstrap"


def bootstrap(session: Session, policy: Policy, chosen: list[Tokens]) -> None:
    """SFT of the policy on chosen responses, kept as `out/bootstrap`, a policy folder.

    Where no SFT model exists, DPO starts from this maximum-likelihood fit, policy and reference
    alike (2305.18290 sec. 4, "DPO outline"). A folder that is there already is loaded.
    """
    cfg: Any = session.cfg
    session.claim()
    folder = session.out / BOOTSTRAP
    if folder.is_dir():
        load_weights(policy.model, str(folder), cfg.model)
        return
    algo = cfg.algo
    epochs = algo.bootstrap_epochs or 1
    steps = math.ceil(len(chosen) / algo.batch_size) * epochs
    optimizer = Optimizer({"policy": (policy.model, algo.bootstrap_lr or algo.lr)}, algo, steps)

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences, session.device)
        logprobs = token_logprobs(policy.model, batch, chunk=cfg.hardware.logprob_chunk).logprobs
        return nll_sum(logprobs, batch.response), {}

    with Bar("bootstrap", steps) as bar:
        for items in epochs_of(chosen, algo.batch_size, epochs, cfg.seed, "bootstrap"):
            tokens = sum(len(sequence.response) for sequence in items)
            batches = cut(items, cfg.hardware.tokens_per_microbatch)
            metrics = optimizer.step([Part(batches, loss, tokens)])
            bar.advance(1, f"loss {metrics['loss']:.3f}")
    set_stop_ids(policy.model, policy.tokenizer, policy.encoder.stop_ids)
    part = aside(folder)
    save_model(policy.model, policy.tokenizer, part, merge=False)
    move_into_place(part, folder)


class ReferenceCache:
    """Log-probs of a reference on disk, so that a second run or a sweep over beta has no pass.

    The file is named after the reference's folder, the token ids of all responses (which rows,
    template, tokenizer and limits make) and the type of matrix products. It holds the hash of the
    reference's weights: one that was written for other weights is stale, and computed again.
    """

    def __init__(self, cfg: Dpo, origin: dict[str, str], answers: list[Answers]) -> None:
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
        folder = cfg.reference_cache
        self.file = None if folder is None else Path(folder) / f"{name[:16]}.safetensors"

    def read(self) -> list[Tensor] | None:
        """Per item the (K,) log-probs of its responses; None where they must be computed."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as stored:
                key, values = stored.metadata(), stored.get_tensor("logprobs")
        except SafetensorError:
            say(f"{self.file}: damaged; the reference is scored again")
            return None
        if key != self._key or len(values) != sum(self._counts):
            say(f"{self.file}: stale, made with another reference; it is scored again")
            return None
        say(f"reference log-probs: read from {self.file}")
        return list(values.split(self._counts))

    def write(self, values: list[Tensor]) -> None:
        """Keep them, in the order of `read`."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.part")
        save_file({"logprobs": torch.cat(values)}, part, metadata=self._key)
        part.replace(self.file)
