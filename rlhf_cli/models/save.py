"""Models out: folders that transformers and peft load as they are."""

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.text_ids import beginning_of
from rlhf_cli.folders.generation import FROM_CONFIG, Settings, ended_by, write_generation
from rlhf_cli.models import scalar_head
from rlhf_cli.models.adapters import POLICY, below, is_adapted, trained
from rlhf_cli.models.decoder import embedding_rows, unwrap
from rlhf_cli.models.masters import held_as, release
from rlhf_cli.models.merging import merged_copy
from rlhf_cli.models.scalar_head import ScalarHead
from rlhf_cli.models.stacking import save_stacked
from rlhf_cli.models.tokenizers import fit_embeddings, source_folder
from rlhf_cli.reporting.console import say

# what a tokenizer is read from; code that it brings along is left where it is
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)

NAMES_OF_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")

ONE_FILE = "50GB"  # where transformers itself begins another


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool,
    dtype: torch.dtype = torch.float32,
    shard_size: str = ONE_FILE,
    rounds: bool = True,
) -> None:
    """A folder that transformers (peft for an unmerged adapter) loads as it is.

    Args:
        dtype: of the weights on disk, to which those of the model are rounded.
        shard_size: of the largest file of whole weights, as `5GB`; one tensor may be larger.
        rounds: whether the model is so from then on; otherwise it is trained on as it is.
    """
    adapted: Any = model if is_adapted(model) else None
    if adapted is not None and not merge:
        base = Path(unwrap(model).config._name_or_path)
        if base.exists():
            adapted.peft_config[POLICY].base_model_name_or_path = str(base.resolve())
        if getattr(unwrap(model), "holds_adapter", False):
            raise UserError(
                "an adapter over a base that another one was merged into is not written alone: "
                "set model.merge_lora=true, or export the policy first and start from that"
            )
        embeds = getattr(unwrap(model), "embeddings_in_adapter", False)
        if below(adapted):
            save_stacked(adapted, folder, dtype)
        else:
            tables = resized(adapted) if embeds else []
            rounded = held_as(dtype, trained(adapted).values(), rounds)
            with rounded, held_as(torch.float32, tables, rounds):
                adapted.save_pretrained(
                    folder, selected_adapters=[POLICY], save_embedding_layers=embeds
                )
        if isinstance(unwrap(model), ScalarHead):  # beside full weights transformers puts it itself
            shutil.copyfile(scalar_head.__file__, folder / Path(scalar_head.__file__).name)
    else:
        whole: Any = model
        if adapted is not None:
            whole = merged_copy(adapted)
        if whole.can_generate():
            whole.generation_config = GenerationConfig()  # ours is written in its place
        with held_as(dtype, whole.parameters(), rounds):
            whole.save_pretrained(folder, max_shard_size=shard_size)
        for name, content in getattr(unwrap(model), "processors", {}).items():
            (folder / name).write_bytes(content)
    settings: Settings | None = getattr(unwrap(model), "generation_settings", None)
    if settings is not None:
        write_generation(settings, folder)
    save_tokenizer(tokenizer, folder)


def save_working(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """The weights that a model computes with, for another program; it is trained on as it is.

    Args:
        dtype: that they are written in; adapters are merged into a copy before.
    """
    whole, state = _working(model, dtype)
    before = whole.generation_config
    try:
        whole.generation_config = GenerationConfig()
        whole.save_pretrained(folder, state_dict=state)
    finally:
        whole.generation_config = before


def working_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that `save_working` writes, by the names that they have in its file."""
    whole, state = _working(model, dtype)
    ignored = getattr(whole, "_keys_to_ignore_on_save", None) or ()
    state = {name: value for name, value in state.items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, whole)
    converted: dict[str, torch.Tensor] = revert_weight_conversion(whole, state)
    return converted


def _working(model: nn.Module, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model without adapters, and its weights in a type, in which tied ones are one."""
    whole: Any = merged_copy(model) if is_adapted(model) else model
    known: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {
        name: known.setdefault((value.data_ptr(), value.shape), value.to(dtype))
        for name, value in whole.state_dict().items()
    }
    return whole, state


def resized(adapted: nn.Module) -> list[nn.Parameter]:
    """The frozen embeddings that an adapter's folder holds, as they are no longer its base's."""
    base = unwrap(adapted)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    tables = {id(each): each for end in ends if end is not None for each in end.parameters()}
    return [weight for weight in tables.values() if not weight.requires_grad]


def set_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> None:
    """Generation stops where training ended responses, in every tool that reads the folder.

    All other settings stay those of the model that training began with.
    """
    base = unwrap(model)
    settings: Settings = getattr(base, "generation_settings", None) or {FROM_CONFIG: True}
    if FROM_CONFIG in settings:  # no file: as transformers reads the config
        named = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        read = base.generation_config.to_diff_dict()
        settings = {key: id for key, id in named.items() if id is not None} | read | settings
    base.generation_settings = ended_by(settings, stop_ids)


# --------------------------------------------------------------------------- tokenizers


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a model folder.

    One that is as it was read, but for an EOS or pad token that it was given, goes by the very
    files that it was read from: what one release of transformers writes, an earlier one need not
    understand.
    """
    _without_limits(tokenizer)
    written = [Path(file).relative_to(folder) for file in tokenizer.save_pretrained(folder)]
    name = str(tokenizer.name_or_path)
    source = source_folder(name, TOKENIZER_FILES[0]) if name else folder
    if source == folder or not all((source / file).is_file() for file in TOKENIZER_FILES[:2]):
        return
    with tempfile.TemporaryDirectory() as place:
        again: Any = _without_limits(type(tokenizer).from_pretrained(name))
        given = {}
        for key in ("eos_token", "pad_token"):
            if getattr(again, key) != getattr(tokenizer, key):
                given[key] = str(getattr(tokenizer, key))
                setattr(again, key, given[key])
        anew = [Path(file).relative_to(place) for file in again.save_pretrained(place)]
        if _texts(folder, written) != _texts(Path(place), anew):
            return
    for file in TOKENIZER_FILES:
        (folder / file).unlink(missing_ok=True)
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    for file in NAMES_OF_TOKENS if given else ():
        if (folder / file).is_file():
            names = json.loads((folder / file).read_text(encoding="utf-8"))
            text = json.dumps({**names, **given}, indent=2, ensure_ascii=False)
            (folder / file).write_text(text + "\n", encoding="utf-8")


def _without_limits(tokenizer: Any) -> Any:
    """The tokenizer as data/text_ids.py leaves it: it neither cuts nor pads by itself."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _texts(folder: Path, files: list[Path]) -> dict[Path, bytes]:
    return {file: (folder / file).read_bytes() for file in files if (folder / file).is_file()}


def set_score_pad(model: nn.Module, tokenizer: Any, stop_ids: Collection[int], whole: bool) -> None:
    """Give the tokenizer of a reward model a pad token that ends no response.

    Transformers reads a score at the last token that is not the pad token, ours stands at the end
    of the response. The pad token is a token that is there already; only where there is none is
    one added, if the folder will hold the embedding too (GPT-2, whose one special token is EOS).

    Args:
        whole: whether the folder will hold all weights, and not only those of an adapter.
    """
    pad = spare_token(tokenizer, stop_ids)
    base = unwrap(model)
    if pad is not None:
        tokenizer.pad_token = pad
    elif whole or len(tokenizer) < embedding_rows(base):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        release(base.parameters())  # a row is added to what is written, and nothing computed after
        base.compute_dtype = torch.float32
        fit_embeddings(base, tokenizer, str(tokenizer.name_or_path))
        say("note: every token of the tokenizer may end a response: <pad> is added for this model")
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    base.config.pad_token_id = tokenizer.pad_token_id


def spare_token(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> str | None:
    """A token that ends no response: its pad token, UNK, one that nobody uses, or BOS."""
    begin = [str(each) for each in tokenizer.convert_ids_to_tokens(beginning_of(tokenizer))]
    used = str(tokenizer.chat_template)
    unused = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in used and token.content not in begin
    ]
    called = [name for name in unused if "pad" in name.lower()]
    for name in (tokenizer.pad_token, *called, tokenizer.unk_token, *unused, *begin):
        if name is not None and tokenizer.convert_tokens_to_ids(name) not in stop_ids:
            return str(name)
    return None
