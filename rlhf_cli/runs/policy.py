"""The policy of a stage: model, tokenizer and the engine that samples from it."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import Hardware
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.load import load_policy, load_tokenizer, stop_ids_of
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.shared import recompute_activations
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.engine import Engine
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.runs.session import Session


@dataclass
class Policy:
    """A language model with its tokenizer and encoder.

    stop_ids: the ids that end its responses.
    engine: the only way to them.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    stop_ids: list[int]
    engine: Engine

    @classmethod
    def of(
        cls, model: nn.Module, encoder: Encoder, stop_ids: list[int], hardware: Hardware
    ) -> "Policy":
        """A policy that is sampled from in this process."""
        engine = NativeEngine(model, encoder, stop_ids, hardware)
        return cls(model, encoder.tokenizer, encoder, stop_ids, engine)


def policy_of(session: Session, path: str) -> Policy:
    """The policy of a folder or hub id; its EOS ids are those that it was trained with."""
    cfg: Any = session.cfg
    tokenizer = load_tokenizer(path, cfg.model)
    encoder = Encoder(tokenizer, cfg.data)
    model = load_policy(path, cfg.model, tokenizer, session.device)
    if cfg.hardware.gradient_checkpointing:
        recompute_activations(model)
    stop_ids = stop_ids_of(path, tokenizer)
    manifest = read_manifest(path)
    if manifest is not None and "eos_ids" in manifest:
        session.require(
            "eos_ids_missing",
            float(len(set(manifest["eos_ids"]) - set(stop_ids))),
            set(manifest["eos_ids"]) <= set(stop_ids),
            f"{path} was trained to end with ids {manifest['eos_ids']} but generates with "
            f"{stop_ids}; its generation_config.json was changed",
        )
        if manifest.get("template") != cfg.data.template:
            say(
                f"note: {path} was trained with template {manifest.get('template')!r}, "
                f"data.template is {cfg.data.template!r}"
            )
    return Policy.of(model, encoder, sorted({*stop_ids, *encoder.stop_ids}), cfg.hardware)


def check_reference(session: Session, reference: Reference) -> None:
    """The reference ends as it began, to the bit."""
    same = reference.digest() == reference.hash
    session.require(
        "reference_unchanged", float(same), same, "training has changed the frozen reference"
    )
