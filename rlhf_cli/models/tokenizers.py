"""Tokenizers in, their rows in the embeddings, and the ids that end a response."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema import FrozenModel
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.loading_faults import told

PROBES = ("the cat and the dog", "thecat", "12", "A")  # a tokenizer of text keeps most
GENERATION = "generation_config.json"


def load_tokenizer(path: str, config: FrozenModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token that is not its EOS."""
    with told(f"{path}: no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        tokenizer.decode(tokenizer("a").input_ids)  # what it was read with is used only now
        _check_class(path, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        unknown = tokenizer.unk_token_id
        spare = unknown is not None and unknown != tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.unk_token if spare else "<pad>"
        if not spare:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = "right"
    return tokenizer


def _check_class(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop where tokenizer_config.json names a class that reads tokenizer.json otherwise.

    Transformers builds some classes anew around the vocabulary: of a file of another kind, all text
    may then become unknown tokens. What the class itself may differ in, such as a leading space,
    passes: each of the file's tokens has its id, and text that the file keeps is kept.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return
    plain = Tokenizer.from_file(str(file))
    ours, theirs = tokenizer.get_vocab(), plain.get_vocab()
    moved = next((token for token, id in theirs.items() if ours.get(token) != id), None)
    lost = None
    for text in PROBES:
        kept = plain.decode(plain.encode(text, add_special_tokens=False).ids).strip() == text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        again = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if kept and again.strip() != text:
            lost = text
    if moved is not None or lost is not None:
        fault = f"{lost!r} is lost" if moved is None else f"token {moved!r} has another id"
        raise UserError(
            f"{path}: tokenizer_config.json names the class {type(tokenizer).__name__}, which does "
            f"not fit tokenizer.json ({fault}); put its own class there, or TokenizersBackend"
        )


def check_vocabulary(
    role: str, path: str, config: FrozenModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Stop where the model of a role reads other tokens than those it will be given."""
    if load_tokenizer(path, config).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{role}={path} has another tokenizer than the policy; train both from one model"
        )


def fit_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for added tokens, drawn around the mean of the others so that none becomes likely."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)


def stop_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS ids of a folder's generation config, with the tokenizer's own."""
    eos = None
    for place in (path, adapter_base(path)):
        if place is None or (Path(place).is_dir() and not Path(place, GENERATION).is_file()):
            continue
        try:
            with told(f"{place}: unreadable {GENERATION}"):
                eos = GenerationConfig.from_pretrained(place).eos_token_id
            break
        except UserError:
            if Path(place).is_dir():
                raise
    ids = eos if isinstance(eos, list) else [eos]
    ids = [id for id in [*ids, tokenizer.eos_token_id] if id is not None]
    if not all(type(id) is int for id in ids):
        raise UserError(f"{path}: {GENERATION} has eos_token_id={eos}, not a whole number")
    return sorted(set(ids))
