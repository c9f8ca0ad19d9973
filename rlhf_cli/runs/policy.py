"""The policy of a stage: model, tokenizer and the engine that samples from it."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema.hardware import VLLM, Hardware
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.data.templates import prefix_of
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import read_manifest
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.positions import positions_of
from rlhf_cli.models.recompute import recompute_activations
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.tokenizers import load_tokenizer, stop_ids_of
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.engine import Engine
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.ranks import RankedEngine
from rlhf_cli.rollout.server import ServerEngine
from rlhf_cli.runs.inherited import KEYS, check_context, told
from rlhf_cli.runs.out_files import ROLLOUTS
from rlhf_cli.runs.session import Session

MANY = 2_000_000  # tokens that a run samples, whose compiled steps are worth the wait for them


@dataclass
class Policy:
    """A language model with its tokenizer and encoder.

    engine: the only way to its responses.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    engine: Engine

    @classmethod
    def of(
        cls, model: nn.Module, encoder: Encoder, hardware: Hardware, compiles: bool = False
    ) -> "Policy":
        """A policy that is sampled from in this process, by compiled steps if it `compiles`, or in
        each of several.
        """
        engine: Engine = NativeEngine(model, encoder, hardware, compiles)
        if world().size > 1:
            engine = RankedEngine(engine, model, encoder, hardware)
        return cls(model, encoder.tokenizer, encoder, engine)

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end its responses."""
        return self.encoder.stop_ids


def policy_of(session: Session, path: str) -> Policy:
    """The policy of a folder or hub id; its EOS ids are those that it was trained with."""
    cfg: Any = session.cfg
    tokenizer = load_tokenizer(path, cfg.model)
    room = getattr(cfg.algo, "max_tokens", None) or 0
    model = load_policy(path, cfg.model, tokenizer, session.device)
    if path == cfg.start:
        session.introduce(model)
    context = positions_of(model)
    check_context(cfg, path, context)
    encoder = Encoder(tokenizer, cfg.data, context, room, prefix_of(cfg.data))
    if cfg.hardware.gradient_checkpointing is True:
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
    encoder.ends_with(stop_ids)
    saying_how(path, encoder)
    policy = Policy.of(model, encoder, cfg.hardware, compiles_sampling(cfg))
    if cfg.hardware.rollout == VLLM:
        place = session.out / ROLLOUTS, cfg.samples_online, cfg.model.trust_remote_code
        policy.engine = ServerEngine(model, encoder, cfg.hardware, *place)
    return policy


def compiles_sampling(cfg: Any) -> bool:
    """Whether pieces of sampling steps are compiled: where asked, or where enough is sampled.

    It goes by the config, not by the clock: what is compiled rounds otherwise, and a run that goes
    on is to end as one that was never ended.
    """
    if cfg.hardware.compile != AUTO:
        return bool(cfg.hardware.compile)
    if not cfg.samples_online:
        return False
    responses = cfg.algo.steps * cfg.algo.batch_size * getattr(cfg.algo, "group_size", 1)
    return bool(responses * (cfg.algo.max_tokens or 0) >= MANY)


def saying_how(path: str, encoder: Encoder) -> None:
    """Say where prompts are written or cut otherwise than where the policy was trained."""
    tokenizer = encoder.tokenizer
    if getattr(tokenizer, "lacked_eos", False):
        say(
            f"note: the tokenizer of {path} names no EOS token: its is {tokenizer.eos_token} from "
            "here on, with which its generation config ends responses"
        )
    theirs = told(read_manifest(path) or {})
    for key in KEYS:
        ours = getattr(encoder.data, key)
        if theirs.get(key) is not None and ours != theirs[key]:
            say(f"note: {path} was trained with data.{key}={theirs[key]!r}, it is {ours!r} here")
    if encoder.replaces_template:
        say(f"note: data.chat_template={encoder.data.chat_template} in place of {path}'s own")


def check_reference(session: Session, reference: Reference) -> None:
    """The reference ends as it began, to the bit."""
    same = reference.digest() == reference.hash
    session.require(
        "reference_unchanged", float(same), same, "training has changed the frozen reference"
    )
