"""The parts of a language model: the decoder without its head, and the head that gives logits.

Where they are is found in each model that is loaded, and tried against its plain forward.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import Batch, collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.logprob_head import LinearHead
from rlhf_cli.models.router_watch import watched
from rlhf_cli.models.row_attention import laid_out
from rlhf_cli.models.shards import whole

ROUNDING = 1e-5  # of one computation in float32, relative to the whole
OTHER_KERNEL = 1e-3  # of a decoder with and without a mask: many sums in another order
PROBED = 5  # tokens
# attributes of sharded models: passes through decoder and head that gather weights for themselves
PASS, HEAD = "sharded_pass", "sharded_head"


@dataclass
class Parts:
    """Where a language model has its decoder and what makes logits of its states.

    trunk: the path of the decoder, from ids to hidden states.
    stands: the path of the module that hidden states stand in for while the model's own forward
        makes logits of them; None where its output embeddings alone give the same.
    head: the names of the weights outside the decoder that logits come from.
    """

    trunk: str
    stands: str | None = None
    head: frozenset[str] = frozenset()


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a peft model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def trunk(model: nn.Module) -> nn.Module:
    """The decoder without its head, adapters included."""
    base = unwrap(model)
    body: nn.Module = attrgetter(parts_of(base).trunk)(base)
    return body


def passing(model: nn.Module) -> Callable[..., Any]:
    """The decoder without its head, to be called; of a sharded model by way of all its groups."""
    through: Callable[..., Any] | None = getattr(unwrap(model), PASS, None)
    return trunk(model) if through is None else through


def embedding_rows(model: nn.Module) -> int:
    """How many tokens a model has embeddings of; its tokenizer may have fewer."""
    weight: Tensor = unwrap(model).get_input_embeddings().weight  # wrapped ones have no other
    return len(weight)


def parts_of(base: Any) -> Parts:
    """The parts that `find_parts` found; the likeliest ones where it was not asked."""
    if not hasattr(base, "found_parts"):
        base.found_parts = Parts((decoder_paths(base) or [base.base_model_prefix])[0])
    parts: Parts = base.found_parts
    return parts


def matmul_in_float32(model: nn.Module) -> bool:
    """Whether model.dtype asks for float32; else weights, states and products are in bfloat16."""
    return bool(getattr(unwrap(model), "compute_dtype", torch.float32) == torch.float32)


@watched
def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states, (B, T, d), in the type that the model computes in."""
    packing = batch.packing  # tells more than a mask of pads could
    body = trunk(model)
    inputs = taken_by(
        body,
        input_ids=batch.ids,
        attention_mask=batch.attention.long() if packing is None else None,
        position_ids=batch.positions,
        use_cache=False,
    )
    lender = getattr(model, "lender", model)  # whose modules a scorer on another's base computes by
    with nullcontext() if packing is None else laid_out(lender, packing):
        output = passing(model)(**inputs)
    hidden: Tensor = output.last_hidden_state
    return hidden


def unembed(model: nn.Module, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits in float32, divided by the temperature: (N, d) -> (N, V).

    Of a sharded model with gradient within `sharding.head_gathered` alone.
    """
    head = linear_head(model)
    if head is not None and hidden.is_cuda and not torch.is_grad_enabled():
        return head.logits(hidden, temperature)  # not rounded to bfloat16, as training has them
    base = unwrap(model)
    stands = parts_of(base).stands
    if not matmul_in_float32(model):
        hidden = hidden.to(torch.bfloat16)  # Mamba's residuals are float32 all the same
    if stands is None:
        # that one would sum its gradient after each chunk, of which ranks have different numbers
        gathers = None if hidden.requires_grad else getattr(base, HEAD, None)
        logits = (gathers or base.get_output_embeddings())(hidden)
    else:
        logits = own_logits(base, stands, hidden)
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def linear_head(model: nn.Module) -> LinearHead | None:
    """The output embeddings where logits are their plain product with the states; else None.

    Not where an adapter or a hook acts on them, nor of weights that are packed into few bits.
    """
    base = unwrap(model)
    if parts_of(base).stands is not None:
        return None
    head = base.get_output_embeddings()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if (
        type(head) is not nn.Linear
        or "forward" in vars(head)
        or any(getattr(head, name) for name in hooks)
        or not head.weight.is_floating_point()
    ):
        return None
    dtype = head.weight.dtype if matmul_in_float32(model) else torch.bfloat16
    weight = whole(head.weight, dtype)
    return LinearHead(weight, head.bias if head.bias is None else whole(head.bias), dtype)


# --------------------------------------------------------------------------- the model's own head


@dataclass
class Given(BaseModelOutput):
    """What a decoder returns of which nothing but the hidden states is known."""

    def __getattr__(self, name: str) -> None:
        """Whatever else is asked for: attentions, a cache, the logits of routers."""


def own_logits(base: nn.Module, path: str, hidden: Tensor) -> Tensor:
    """Logits by the model's own forward, hidden states in place of a module: (N, d) -> (N, V).

    Whatever the model does to the states and to its logits (scales, norms, layers, soft caps) is
    done, by its own code.
    """
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    model = _standing_in(base, path, hidden[None])
    logits: Tensor = model(**taken_by(base, input_ids=ids, use_cache=False)).logits
    return logits[0]


def _standing_in(module: nn.Module, path: str, hidden: Tensor) -> nn.Module:
    """A shallow copy of a module, weights and all, whose submodule at a path gives these states."""
    twin: nn.Module = object.__new__(type(module))  # copy.copy makes a sharded one anew
    vars(twin).update(vars(module))
    if path:
        name, _, rest = path.partition(".")
        inner = _standing_in(module.get_submodule(name), rest, hidden)
        twin.__dict__["_modules"] = {**module._modules, name: inner}
    else:
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
        twin.forward = lambda *args, **kwargs: Given(hidden)
    return twin


def taken_by(module: nn.Module, **inputs: Any) -> dict[str, Any]:
    """Those of the inputs that a module's forward takes."""
    names = _names_taken(type(module).forward) if isinstance(module, nn.Module) else None
    return {name: value for name, value in inputs.items() if names is None or name in names}


@cache
def _names_taken(forward: Callable[..., Any]) -> frozenset[str] | None:
    """The arguments of a forward; None where it takes any."""
    parameters = inspect.signature(forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return frozenset(parameters)


# --------------------------------------------------------------------------- the search


def decoder_paths(base: Any) -> list[str]:
    """Where the decoder may be, the likeliest first: what holds the embeddings and blocks.

    Of a model that sees, the innermost is the one that reads text alone, by 2-D positions. What a
    class calls its base comes last, as some name a module that they have not.
    """
    names = {module: name for name, module in base.named_modules()}
    path = names.get(_embeddings(base), "")
    paths = []
    while path := path.rpartition(".")[0]:
        module = base.get_submodule(path)
        lists = (nn.ModuleList, nn.ModuleDict)
        if not isinstance(module, lists) and any(
            isinstance(each, lists) for each in module.modules()
        ):
            paths.append(path)
    prefix = base.base_model_prefix
    return paths if prefix in paths or not hasattr(base, prefix) else [*paths, prefix]


def _embeddings(base: Any) -> Any:
    """The token embeddings; None where the library knows of none."""
    return _try(lambda: base.get_input_embeddings())


def find_parts(model: nn.Module) -> None:
    """Find decoder and head of a language model by a pass of a few tokens.

    `trunk` and `unembed` go by what is found.

    Raises:
        UserError: naming the class, where no part of it does what they ask for.
    """
    base = unwrap(model)
    name = f"{base.config._name_or_path}: {type(base).__name__}".removeprefix(": ")
    if not (paths := decoder_paths(base)) or _embeddings(base) is None:
        raise UserError(
            f"{name} has no part that holds token embeddings and blocks, as decoders do"
        )
    tokens = plain_ids(base)
    batch = collate([Tokens(tokens[:1], tokens[1:])], next(base.parameters()).device)
    with torch.no_grad():
        try:
            with outputs_of(base, paths) as seen:  # of all tokens but one, which none may look at
                plain = base(**taken_by(base, input_ids=batch.ids[:, :-1], use_cache=False)).logits
        except Exception as error:  # models refuse what they do not know in many ways
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{name} makes no logits of text alone: {said}{_way_on(base)}"
            ) from None
        for path in paths:
            hidden = getattr(seen.get(path), "last_hidden_state", None)
            if hidden is None or (found := _head_of(base, path, hidden[0], plain[0])) is None:
                continue
            base.found_parts = found
            ours = _try(lambda: hidden_states(model, batch)[:, :-1])
            if _same(ours, hidden, OTHER_KERNEL):
                found.head = _weights_behind(base, hidden[0])
                return
    raise UserError(
        f"{name} makes its logits in a way that is not supported: not of what its decoder alone "
        f"gives, or that sees later tokens{_way_on(base)}"
    )


def _way_on(base: Any) -> str:
    """What is left to do with a model that has a text model inside it."""
    inside = hasattr(base.config, "text_config")
    return "; its text model may be trained once it is saved on its own" if inside else ""


def probe_of(model: nn.Module) -> Batch:
    """A batch of a few tokens."""
    tokens = plain_ids(unwrap(model))
    return collate([Tokens(tokens[:1], tokens[1:])], next(model.parameters()).device)


def plain_ids(base: Any) -> list[int]:
    """A few ids that stand for nothing but text."""
    return (text_ids(base) * PROBED)[:PROBED]


def text_ids(base: Any) -> list[int]:
    """All ids that stand for nothing but text: no pad, no place of an image."""
    size = len(_embeddings(base).weight)
    special = set(_special_ids(base.config.to_dict()))
    return [id for id in range(size) if id not in special] or [0]


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")) and value is not None:
            yield from value if isinstance(value, list) else [value]


@contextmanager
def outputs_of(base: nn.Module, paths: list[str]) -> Iterator[dict[str, Any]]:
    """What the modules at these paths return within this block, by path."""
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(path, output)

    hooks = [base.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _head_of(base: Any, path: str, hidden: Tensor, plain: Tensor) -> Parts | None:
    """How the logits of a plain forward, (T, V), are made of the states of a module, (T, d).

    The outermost module that can be stood in for is: what a wrapper does before its decoder need
    not be done. The output embeddings alone do where they give the same far from 0, too.
    """
    steps = path.split(".")
    for depth in range(1, len(steps) + 1):
        stands = ".".join(steps[:depth])
        with_own = _try(lambda stands=stands: own_logits(base, stands, hidden))  # type: ignore[misc]
        if with_own is None or not _same(with_own, plain, ROUNDING):
            continue
        most = with_own[with_own.isfinite()].abs().max().item()
        sizes = [1.0, 1e2 / most, 1e4 / most] if most else []
        alone = all(
            _same(
                _try(lambda size=size: base.get_output_embeddings()(size * hidden)),  # type: ignore[misc]
                own_logits(base, stands, size * hidden),
                ROUNDING,
            )
            for size in sizes
        )
        return Parts(path, None if sizes and alone else stands)
    direct = _try(lambda: base.get_output_embeddings()(hidden))
    return Parts(path) if _same(direct, plain, ROUNDING) else None


def _try(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except Exception:  # what a model does with what it does not know, it says in many ways
        return None


def _same(ours: Tensor | None, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the second one's norm."""
    if ours is None or ours.shape != theirs.shape:
        return False
    ours, theirs = ours.float(), theirs.float()
    finite = theirs.isfinite() & (theirs.abs() < torch.finfo(theirs.dtype).max / 10)  # not masked
    apart = (ours - theirs)[finite].norm()
    return bool(
        torch.equal(ours[~finite], theirs[~finite]) and apart <= tolerance * theirs[finite].norm()
    )


def _weights_behind(base: nn.Module, hidden: Tensor) -> frozenset[str]:
    """The names of the weights that `unembed` computes with."""
    with torch.enable_grad():
        last: Any = unembed(base, hidden).grad_fn
    reached, nodes, known = set(), [last], {last}
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        following = {each for each, _ in getattr(node, "next_functions", ())} - known
        nodes += [each for each in following if each is not None]
        known |= following
    return frozenset(name for name, weight in base.named_parameters() if id(weight) in reached)
