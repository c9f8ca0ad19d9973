"""Tokenizers in, their rows in the embeddings, and the ids that end a response."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.models import FrozenModel
from rlhf_cli.folders.generation import Settings, eos_ids, name_eos, read_generation
from rlhf_cli.folders.manifest import adapter_base
from rlhf_cli.models.decoder import embedding_rows, unwrap
from rlhf_cli.models.hub import cached
from rlhf_cli.models.loading_faults import told
from rlhf_cli.reporting.console import say

PROBES = ("the cat and the dog", "thecat", "12", "A")  # a tokenizer of text keeps most
FILES = ("tokenizer.json", "tokenizer_config.json")
SHOWN = 5  # added tokens in a line


def load_tokenizer(path: str, config: FrozenModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; of an adapter without one, its base's.

    It stays as it is, but for an EOS token: one that names none gets that of the generation config.
    Batches pad by length, so that nothing is asked of a pad token.
    """
    base = adapter_base(path)
    if base is not None and not any(Path(path, file).is_file() for file in FILES):
        return load_tokenizer(base, config)
    if not Path(path).is_dir() and cached(path, "config.json") is None and not HF_HUB_OFFLINE:
        say(f"{path} is not on this machine: it is fetched from the hub")
    with told(f"{path}: no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        tokenizer.decode(tokenizer("a").input_ids)  # what it was read with is used only now
        _check_class(path, tokenizer)
    name_eos(tokenizer, generation_of(path), path)
    return tokenizer


def source_folder(path: str, file: str) -> Path:
    """Where a folder lies, or the files of a hub id that are on this machine."""
    if Path(path).exists():
        return Path(path)
    found = None
    with suppress(OSError, ValueError):  # not on this machine, or no id at all
        found = cached_file(
            path,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return Path(path) if found is None else Path(found).parent


def generation_of(path: str) -> Settings | None:
    """The generation config of a folder or hub id, of an adapter that has none its base's."""
    return read_generation(path, lambda place: source_folder(place, "generation_config.json"))


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


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids; a pad token stands in no text."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    if one.pad_token not in theirs:
        ours.pop(str(one.pad_token), None)
    if other.pad_token not in ours:
        theirs.pop(str(other.pad_token), None)
    return ours == theirs


def check_vocabulary(
    role: str, path: str, config: FrozenModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Stop where the model of a role reads other tokens than those it will be given."""
    if not same_ids(load_tokenizer(path, config), tokenizer):
        raise UserError(
            f"{role}={path} has another tokenizer than the policy; train both from one model"
        )


def stop_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS ids of a folder's generation config that the tokenizer has, with its own."""
    ids = [*eos_ids(generation_of(path), path), tokenizer.eos_token_id]
    return sorted({id for id in ids if id is not None and id < len(tokenizer)})


def ids_of_no_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The rows of a model's unembedding that stand for no token, as padding of it does."""
    unembedding = unwrap(model).get_output_embeddings()
    rows = len(unembedding.weight)
    return tuple(sorted(set(range(rows)).difference(tokenizer.get_vocab().values())))


# --------------------------------------------------------------------------- added tokens


@torch.no_grad()
def fit_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase, path: str) -> str | None:
    """Rows for tokens that a model has none for: the mean of the others, so that none is likely.

    `model.added_rows` says which they are, for `trainable_rows`. Rows beyond the tokenizer's stay,
    and are added where an adapter that is to come was trained with more, as padding.

    Returns:
        A line on how many and which; None where there are none.

    Raises:
        UserError: the model fails at such a token, as by a further table that stays too short.
    """
    before = embedding_rows(model)
    model.added_rows = range(before, max(before, len(tokenizer)))
    count = len(model.added_rows)
    rows = max(before + count, getattr(model, "rows_in_adapter", 0))
    if rows == before:
        return None
    with torch.random.fork_rng(devices=[]):  # what is drawn for them is overwritten
        model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if module is None else module.parameters():
            weight[before:] = weight[:before].mean(0)
    if not count:
        return None
    with told(f"{path}: its model cannot take the {count} tokens that its tokenizer adds"):
        model(input_ids=torch.tensor([[len(tokenizer) - 1]]))
    names = [str(each) for each in tokenizer.convert_ids_to_tokens(list(model.added_rows))]
    shown = ", ".join(names[:SHOWN]) + (", ..." if count > SHOWN else "")
    return (
        f"note: the tokenizer of {path} has {count} token{'s' * (count > 1)} more than the model "
        f"has rows, {before} ({shown}): new rows start at the mean of the others"
    )


def trainable_rows(model: Any, path: str) -> dict[str, list[int]] | None:
    """The rows of added tokens, by the name of their table, as peft's LoraConfig takes them.

    A tied unembedding follows the embedding.

    Raises:
        UserError: peft would lose the bias of the unembedding.
    """
    rows = list(getattr(model, "added_rows", ()))
    if not rows:
        return None
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if outputs is None or outputs.weight is inputs.weight:
        return {names[id(inputs)]: rows}
    if getattr(outputs, "bias", None) is not None:
        raise UserError(
            f"{path}: its tokenizer has {len(rows)} tokens more than the model has rows, and an "
            "adapter cannot train rows with a bias; set model.lora_rank=0 for the first stage"
        )
    return {names[id(inputs)]: rows, names[id(outputs)]: rows}


def leave_absent_rows(model: Any, config: Any) -> None:
    """Take the tables that a model lacks out of the rows that an adapter's config trains.

    Such is the unembedding of a policy, under the head of a scorer.
    """
    rows = getattr(config, "trainable_token_indices", None)
    if isinstance(rows, dict):
        names = [name for name, _ in model.named_modules()]
        config.trainable_token_indices = {
            table: ids for table, ids in rows.items() if any(name.endswith(table) for name in names)
        }
