"""Models in: from a hub id, a folder, or an adapter folder on its base."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.config.schema import FrozenModel, Model
from rlhf_cli.folders.integrity import check_weights_hash
from rlhf_cli.folders.manifest import RESPONSE, adapter_base, level_of, shapes_of
from rlhf_cli.models.adapters import (
    CRITIC,
    POLICY,
    PREFIX,
    REWARD,
    adapter_config,
    adapter_weights,
    check_patterns,
    is_adapted,
    put_weights,
)
from rlhf_cli.models.dropout import disable_dropout
from rlhf_cli.models.dtypes import product_type, source_type
from rlhf_cli.models.forward import check_unembedding, unwrap
from rlhf_cli.models.heads import HEAD_NAMES, head_name, init_head, scalar_head
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.models.out_of_memory import if_it_fits, ran_out
from rlhf_cli.models.shared import critic_on_base, freeze_lowest, scorer_on_base, share_frozen

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# what these libraries will rename is no news to our users
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")

PROBES = ("the cat and the dog", "thecat", "12", "A")  # a tokenizer of text keeps most
GENERATION = "generation_config.json"
HEADS = {f"{head}.{part}" for head in HEAD_NAMES for part in ("weight", "bias")}


def load_tokenizer(path: str, config: FrozenModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token that is not its EOS."""
    with _told(f"{path}: no usable tokenizer"):
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


Rest = ParamSpec("Rest")
Loaded = TypeVar("Loaded")


def _fits(
    load: Callable[Concatenate[str, Rest], Loaded],
) -> Callable[Concatenate[str, Rest], Loaded]:
    """A loader of the folder or hub id given first, with a line for when memory runs out."""

    @wraps(load)
    def loader(path: str, *args: Rest.args, **kwargs: Rest.kwargs) -> Loaded:
        loaded = if_it_fits(lambda: load(path, *args, **kwargs))
        if loaded is None:
            shapes = shapes_of(Path(adapter_base(path) or path))
            count = sum(map(math.prod, shapes.values()))
            size = f": {count} weights x 4 bytes = {count * 4 / 2**30:.2f} GiB" if count else ""
            raise RunError(
                f"out of memory while loading {path}{size}; what helps: a smaller model, or fewer "
                "roles with weights of their own (--check counts them)"
            )
        return loaded

    return loader


def check_vocabulary(
    role: str, path: str, config: FrozenModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Stop where the model of a role reads other tokens than those it will be given."""
    if load_tokenizer(path, config).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{role}={path} has another tokenizer than the policy; train both from one model"
        )


@_fits
def load_policy(
    path: str, config: FrozenModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> nn.Module:
    """A language model ready for its stage: adapter merged or continued, dropout off.

    An adapter folder is loaded as base plus adapter. With model.lora_rank > 0 its adapter goes on
    being trained, otherwise it is merged into the weights.

    Raises:
        UserError: weights are missing or unreadable, or an adapter has another rank.
    """
    model = _load_base(path, config, AutoModelForCausalLM, allowed_missing=set())
    fit_embeddings(model, tokenizer)
    check_unembedding(model)
    return _adapt(model, path, config, "CAUSAL_LM", device).to(device)


@_fits
def load_scorer(
    path: str,
    config: FrozenModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: nn.Module | None = None,
) -> nn.Module:
    """A reward model, or a critic that starts as one: classifier with one label.

    Of whole responses it is a sequence classifier, of steps and tokens a token classifier.

    Args:
        base: the policy. Where the folder is an adapter on the base of an adapted policy, the
            scorer is one more adapter there; frozen layers of a full policy are shared if equal.

    Raises:
        UserError: the folder holds no scalar head, or weights are missing or unreadable.
    """
    named = adapter_base(path)
    if base is not None and is_adapted(base) and named is not None:
        trainable = _rank(config) > 0
        role = _free_name(base, CRITIC if trainable else REWARD)
        check_weights_hash(path)
        _check_adapter(path)
        with _told(f"{path}: cannot load the adapter"):
            scorer = scorer_on_base(base, path, named, role, trainable)
        if scorer is not None:
            return scorer
    auto, task = _classifier(level_of(path))
    held = set() if named is None else {name.removeprefix(PREFIX) for name in _own_names(path)}
    model = _load_base(path, config, auto, allowed_missing=HEADS & held)
    if head_name(model) is None or scalar_head(model).out_features != 1:
        raise UserError(f"{path}: not a reward model with one label called score")
    model.config.pad_token_id = tokenizer.pad_token_id
    return _beside(_adapt(model, path, config, task, device).to(device), base)


@_fits
def scorer_from_policy(
    path: str,
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    level: str = RESPONSE,
    base: nn.Module | None = None,
) -> nn.Module:
    """The policy's trunk with a fresh scalar head in place of the unembedding.

    Args:
        base: the policy of that path, as it was loaded. Of an adapted one the scorer is one more
            adapter on the same base, with the weights of the policy's; frozen layers of a full one
            are shared.
    """
    if base is not None and is_adapted(base):
        width = unwrap(base).config.get_text_config().hidden_size
        head = nn.Linear(width, 1, bias=level != RESPONSE)
        init_head(head, seed)
        return critic_on_base(base, _free_name(base, CRITIC), head)
    auto, task = _classifier(level)
    model = _load_base(path, config, auto, allowed_missing=HEADS)
    if head_name(model) is None:
        raise UserError(f"{path}: {type(model).__name__} has no scalar head called score")
    init_head(scalar_head(model), seed)
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _beside(_adapt(model, path, config, task, device).to(device), base)


def load_critic(
    reward_path: str | None,
    policy_path: str,
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    base: nn.Module,
) -> nn.Module:
    """The network of a separate critic: a copy of a reward model, or the policy's trunk.

    Args:
        reward_path: a reward model of whole responses; null starts from the policy, and all values
            at 0, since those of a random head would be noise.
        base: the policy, which the critic shares weights with where that is possible.
    """
    if reward_path is not None:
        return load_scorer(reward_path, config, tokenizer, device, base)
    critic = scorer_from_policy(policy_path, config, tokenizer, seed, device, base=base)
    with torch.no_grad():
        for weight in scalar_head(unwrap(critic)).parameters():
            weight.zero_()
    return critic


def _free_name(adapted: Any, role: str) -> str:
    """The role, numbered where the base bears an adapter of that name."""
    names = (role, *(f"{role}{i}" for i in range(2, len(adapted.peft_config) + 2)))
    return next(name for name in names if name not in adapted.peft_config)


def _rank(config: FrozenModel) -> int:
    """The rank of the adapter that is trained; 0 for none."""
    return config.lora_rank if isinstance(config, Model) else 0


def _beside(model: nn.Module, policy: nn.Module | None) -> nn.Module:
    """A full model beside a full policy, whose frozen layers it shares."""
    if policy is not None and not is_adapted(policy):
        share_frozen(model, policy)
    return model


def _classifier(level: str) -> tuple[Any, str]:
    """The auto class of a reward model and peft's name of its task."""
    if level == RESPONSE:
        return AutoModelForSequenceClassification, "SEQ_CLS"
    return AutoModelForTokenClassification, "TOKEN_CLS"


def fit_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for added tokens, drawn around the mean of the others so that none becomes likely."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)


def _load_base(path: str, config: FrozenModel, auto: Any, allowed_missing: set[str]) -> Any:
    """The full model of a folder; of an adapter folder, its base."""
    base = adapter_base(path)
    if find_adapter_config_file(base or path) is not None:  # its weights might be a pickle
        raise UserError(
            f"{path}: {base or path} is an adapter, and no base is known that it belongs to; "
            "download it, or merge it into its base"
        )
    labels = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
    for folder in (base, path):
        check_weights_hash(folder or path)
    with _told(f"{path}: cannot load the model"):
        model, info = auto.from_pretrained(
            base or path,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # else weights that are a pickle would do as well
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **labels,
        )
    missing = {str(name) for name in info["missing_keys"]} - allowed_missing
    if missing or info["mismatched_keys"]:
        names = sorted(missing) or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise UserError(f"{path}: {len(names)} weights missing or misshapen, such as {names[0]}")
    _check_finite(base or path, model.state_dict())
    with _told(f"{path}: unreadable config"):
        model.source_dtype = source_type(base or path)  # read where it is written
    model.adapter_dtype = model.source_dtype if base is None else source_type(path)
    return model


def _check_finite(path: str, weights: Mapping[str, Tensor]) -> None:
    """Stop where a folder holds a weight that is not finite."""
    if (name := first_nonfinite(weights)) is not None:
        raise UserError(
            f"{path}: weight {name} holds a NaN or an infinity; make or download the folder again"
        )


def _own_names(path: str) -> set[str]:
    """The names of an adapter folder's own weights."""
    with _told(f"{path}: cannot load the adapter"):
        return set(adapter_weights(path))


def _check_adapter(path: str) -> None:
    """`_check_finite` of an adapter folder's own weights."""
    with _told(f"{path}: cannot load the adapter"):
        _check_finite(path, adapter_weights(path))


def _adapt(
    model: Any, path: str, config: FrozenModel, task: str, device: torch.device
) -> nn.Module:
    """Put the folder's adapter, or a fresh one, where model.lora_rank asks for it; no dropout."""
    parameters = sum(weight.numel() for weight in model.parameters())
    # read by models/forward.py
    model.compute_dtype = product_type(config.dtype, parameters, device)
    if adapter_base(path) is not None:
        _check_adapter(path)
    with _told(f"{path}: cannot load the adapter"):
        adapted = _with_adapter(model, path, config, task)
    disable_dropout(adapted)
    if isinstance(config, Model) and config.frozen_layers:
        freeze_lowest(adapted, config.frozen_layers)
    return adapted


def _with_adapter(model: Any, path: str, config: FrozenModel, task: str) -> nn.Module:
    rank = _rank(config)
    is_adapter = adapter_base(path) is not None
    if rank == 0 and not is_adapter:
        return model
    import peft

    if rank == 0:
        own = adapter_config(path)
        check_patterns(model, own)
        policys = task not in ("CAUSAL_LM", own.task_type)
        own.task_type = None  # a policy's adapter merges into the trunk of a scorer too
        merged = _loaded_adapter(model, path, config=own, head_left=policys).merge_and_unload()
        return merged.requires_grad_(True)  # peft froze what is now trained in full
    assert isinstance(config, Model)
    head = None if task == "CAUSAL_LM" else head_name(model)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        exclude_modules=[head] if head else None,
        task_type=task,
    )
    if is_adapter:
        lora = adapter_config(path)
        check_patterns(model, lora)
        if (rank, config.lora_alpha) != (lora.r, lora.lora_alpha):
            raise UserError(
                f"{path}: its adapter has rank {lora.r} and alpha {lora.lora_alpha}; set "
                f"model.lora_rank={lora.r} model.lora_alpha={lora.lora_alpha}"
            )
        if lora.task_type == task:
            return _loaded_adapter(model, path, is_trainable=True)
        lora.task_type, lora.inference_mode = task, False  # a policy's adapter, under a new head
    if head:
        lora.modules_to_save = [head]
    adapted = peft.get_peft_model(model, lora)
    if is_adapter:
        weights = adapter_weights(path)
        fresh: Any = getattr(unwrap(adapted), head or "score")
        for name, value in fresh.original_module.named_parameters():
            weights[f"{PREFIX}{head}.{name}"] = value.detach()
        put_weights(adapted, POLICY, weights, path, head_left=True)
    return adapted


def _loaded_adapter(model: Any, path: str, head_left: bool = False, **settings: Any) -> Any:
    """The model with a folder's adapter as peft puts it there, every tensor accounted for."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
        adapted = peft.PeftModel.from_pretrained(model, path, **settings)
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    weights = peft.load_peft_weights(path, device="cpu", key_mapping=renamed)
    put_weights(adapted, POLICY, weights, path, head_left)
    return adapted


@contextmanager
def _told(what: str) -> Iterator[None]:
    """One line for whatever a library raises over a folder: each raises many kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(f"{what}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of what a library says; of code that it will not run, which key lets it."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own; read that, then set model.trust_remote_code=true"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS ids of a folder's generation config, with the tokenizer's own."""
    eos = None
    for place in (path, adapter_base(path)):
        if place is None or (Path(place).is_dir() and not Path(place, GENERATION).is_file()):
            continue
        try:
            with _told(f"{place}: unreadable {GENERATION}"):
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


def load_weights(model: nn.Module, folder: str, config: Model) -> None:
    """Put the weights of a folder that `save_model` wrote unmerged back into the same model."""
    if is_adapted(model):
        put_weights(model, POLICY, adapter_weights(folder), folder)
    else:
        model.load_state_dict(
            _load_base(folder, config, AutoModelForCausalLM, allowed_missing=set()).state_dict()
        )
