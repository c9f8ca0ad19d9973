"""Weights that are sharded over ranks by FSDP2: each holds a part, and gathers what it computes by.

A block is gathered for its own pass, what is beside blocks (embeddings, norms) for a whole pass,
and the unembedding where it is used; each again in backward. Adapters of all roles are gathered
with the block that they are on. A scalar head, a row of numbers, stays whole on each rank: its
gradient is summed as that of any weight that is not sharded. What is trained is sharded in float32;
with model.dtype=bfloat16 it is gathered in that type, and its gradients are summed in float32.

In one process nothing here does anything, and nothing of torch.distributed is imported.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rlhf_cli.config.errors import UserError
from rlhf_cli.models.decoder import HEAD, PASS, hidden_states, parts_of, probe_of, unwrap
from rlhf_cli.models.dropout import blocks_of
from rlhf_cli.models.keeping_up import STEPS, counted
from rlhf_cli.models.shards import is_sharded, like, own_part
from rlhf_cli.ranks.world import world

SAME = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # share of the norm that rounding may make


# --------------------------------------------------------------------------- a model


def shard(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    plain: Collection[Tensor],
    prepare: Callable[[], None],
    narrow: Callable[[nn.Module], None],
    copied: bool,
) -> None:
    """Move a model to the device, each rank its parts.

    It is tried whether it computes the same afterwards, which it does not where blocks are used
    otherwise than by their forward.

    Args:
        model: whole and in float32, the same on each rank.
        dtype: that it is to compute in.
        plain: weights that each rank is to hold whole.
        prepare: lets the model compute in that type.
        narrow: casts what is not trained of a module to the type in which it is held.
        copied: whether `twin` may be asked for.

    Raises:
        UserError: it computes something else.
    """
    base = unwrap(model)
    cpu = probe_of(model)
    with torch.no_grad():
        before = hidden_states(model, cpu)
    prepare()
    if copied:
        base.skeleton = (_skeleton(model),)
    base.compute_dtype = dtype
    try:
        _wrap(model, {id(each) for each in plain}, dtype, narrow)
        model.to(device)
        with torch.no_grad():
            after = hidden_states(model, probe_of(model)).to(before)
        let_go(model)
    except Exception as error:  # models refuse what they do not know in many ways
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{_refused(base)}: {said}") from error
    if not (after - before).norm() <= SAME[dtype] * before.norm():
        raise UserError(f"{_refused(base)}: sharded, it computes something else")


def _refused(base: nn.Module) -> str:
    return f"{type(base).__name__} cannot be sharded (hardware.shard=none keeps it whole)"


def _wrap(
    model: nn.Module,
    plain: Collection[int],
    dtype: torch.dtype,
    narrow: Callable[[nn.Module], None] = lambda group: None,
) -> None:
    """Make a group of each block, of each tower, and of the rest.

    One by one, so that no more than one of them is ever whole outside of the files that it is in.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    base = unwrap(model)
    blocks = blocks_of(model)
    uses = Counter(id(weight) for block in blocks for weight in block.parameters())
    left = {
        weight
        for weight in model.parameters()
        if id(weight) in plain or uses[id(weight)] > 1 or not weight.ndim
    }
    apart = [base.get_submodule(path) for path in getattr(base, "towers", [])]
    for group in [*blocks, *apart, base]:
        narrow(group)
        fully_shard(
            group,
            mesh=world().mesh,
            reshard_after_forward=True,  # the root, too: between passes a rank holds its parts
            ignored_params=left,
        )
    STEPS.models.add(base)
    for group in _groups(base):
        type(group).__name__ = class_before(type(group)).__name__  # by which messages name it
        group.set_gradient_divide_factor(1.0)  # gradients are sums over ranks
        group.set_force_sum_reduction_for_comms(True)
        counted(group)
        if group in blocks and any(isinstance(each, nn.ModuleList) for each in group.modules()):
            # experts that are modules: ranks may have gradients of different ones
            group.set_reduce_scatter_unused_params(True)
    _gather_in(base, dtype)
    setattr(base, PASS, lambda **inputs: attrgetter(parts_of(base).trunk)(base)(**inputs))
    setattr(base, HEAD, lambda hidden: base.get_output_embeddings()(hidden))
    for name in (PASS, HEAD):
        register_fsdp_forward_method(base, name)


def _groups(base: nn.Module) -> list[Any]:
    """The modules that are gathered one by one, the root first."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in base.modules() if isinstance(module, FSDPModule)]


def _gather_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Let weights be gathered in a type from now on; their gradients are summed in float32.

    FSDP2 is told it once, before the first pass; after that what it has set up for it goes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    types = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in _groups(base):
        state = module._get_fsdp_state()
        state._mp_policy = types
        for group in state._fsdp_param_groups:
            group.mp_policy = types
            for weight in group.fsdp_params:
                weight.all_gather_outputs = []
                vars(weight).pop("_unsharded_param", None)
            group._init_mp_dtypes()


@torch.no_grad()
def shard_adapter(model: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Shard an adapter that was put on a sharded model: each block then gathers its part of it.

    Args:
        weights: of the adapter, whole and the same on each rank.
    """
    base = _root_of(model)
    if base is None:
        return
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    let_go(base)
    left = {id(weight) for weight in weights if weight.ndim and not is_sharded(weight)}
    for group in reversed(_groups(base)):  # what is within others comes before them
        for gathers in group._get_fsdp_state()._fsdp_param_groups:
            places = [
                (ParamModuleInfo(module, name), weight)
                for module in group.modules()
                for name, weight in module.named_parameters(recurse=False)
                if id(weight) in left
            ]
            like = (gathers.mesh_info, gathers.post_forward_mesh_info, gathers.device, None)
            policies = (gathers.mp_policy, gathers.offload_policy)
            gathers.fsdp_params += [
                FSDPParam(weight, place, *like, *policies) for place, weight in places
            ]
            gathers._init_mp_dtypes()
            left -= {id(weight) for _, weight in places}


@contextmanager
def gathered_in_float32(model: nn.Module) -> Iterator[None]:
    """A block in which a sharded model computes in float32, whatever it does elsewhere."""
    base = _root_of(model)
    if base is None or base.compute_dtype == torch.float32:
        yield
        return
    _gather_in(base, torch.float32)
    try:
        yield
    finally:
        _gather_in(base, base.compute_dtype)


def ready_to_learn(model: nn.Module) -> None:
    """Called before a model is trained: FSDP2 has kept what was trained as it first computed."""
    if (base := _root_of(model)) is not None:
        _gather_in(base, base.compute_dtype)


def hold_parts_in_float32(model: nn.Module) -> None:
    """Hold so what of a sharded model, loaded as a frozen one, is to be trained now."""
    base = _root_of(model)
    if base is None:
        return
    floats = {
        id(weight): nn.Parameter(like(weight, own_part(weight.detach()).float()), False)
        for weight in model.parameters()
        if is_sharded(weight)
    }
    for network in (base, model):  # a scorer on the base knows its adapter by other names, too
        named = list(network.named_parameters(remove_duplicate=False))
        _set(network, [(name, floats[id(each)]) for name, each in named if id(each) in floats])
    for weight in _cut_weights(base):
        weight.reset_sharded_param()
    ready_to_learn(model)


def _cut_weights(base: nn.Module) -> list[Any]:
    """What FSDP2 knows of each weight."""
    states = [module._get_fsdp_state() for module in _groups(base)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return [weight for group in groups for weight in group.fsdp_params]


def class_before(kind: Any) -> Any:
    """The class that a module had before it was sharded; None for one that was not."""
    from torch.distributed.fsdp import FSDPModule

    line = kind.__mro__
    return line[line.index(FSDPModule) + 1] if FSDPModule in line else None


def _root_of(model: nn.Module) -> Any:
    """The base whose weights a model computes with, if they are sharded; else None."""
    base = unwrap(getattr(model, "lender", model))
    return base if hasattr(base, PASS) else None


def is_in_parts(model: nn.Module) -> bool:
    """Whether its weights are sharded; of a scorer on another's base, whether those are."""
    return _root_of(model) is not None


@contextmanager
def held_whole(model: nn.Module) -> Iterator[None]:
    """A block in which each rank holds all of a model, and can compute by itself."""
    base = _root_of(model)
    if base is None or getattr(base, "is_gathered", False):
        yield
        return
    groups = _groups(base)
    base.is_gathered = True
    try:
        for group in groups:
            group.unshard()
            group.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        base.is_gathered = False
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
        let_go(model)


@contextmanager
def head_gathered(*models: nn.Module) -> Iterator[None]:
    """A block in which heads of models are used any number of times, on each rank another.

    With gradient they stay gathered for backward, which may use them again, and until its end, or
    until `let_go` where it does not pass through the model.
    """
    bases = {id(base): base for base in map(_root_of, models) if base is not None}
    sharded = [base for base in bases.values() if not getattr(base, "is_gathered", False)]
    for base in sharded:
        base.unshard()
        base.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for base in sharded:
            base.set_reshard_after_forward(True, recurse=False)
            if not torch.is_grad_enabled():
                base.reshard()


def let_go(model: nn.Module) -> None:
    """Forget passes that no backward pass follows, and free what one that broke off gathered."""
    base = _root_of(model)
    if base is not None and not getattr(base, "is_gathered", False):
        base.reset_iter_state()


def norm_of_all(gradients: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The norm of gradients, of what is sharded and of what each rank holds whole.

    In float64 between ranks, so that a single part has the norm that it had.

    Args:
        gradients: each with its weight; of one that is sharded this rank's part.
    """
    mesh = world().mesh
    tells = mesh.get_local_rank(mesh.ndim - 1) == 0  # of what is whole, for all
    own = get_total_norm([grad for weight, grad in gradients if tells or is_sharded(weight)])
    total = own.double().square()
    world().sum([total])
    copies = mesh.size(0) if mesh.ndim > 1 else 1
    return (total / copies).sqrt().to(own)


def hash_of_ranks(own: bytes) -> str:
    """One hash of those that the ranks have of their parts."""
    hashes = world().gather([torch.frombuffer(bytearray(own), dtype=torch.uint8).long()])
    return hashlib.sha256(bytes(byte for each in hashes for byte in each.tolist())).hexdigest()


# --------------------------------------------------------------------------- a frozen copy


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights have shapes only."""
    shapes = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, shapes)


def twin(model: nn.Module) -> nn.Module:
    """A frozen copy of a sharded model, sharded alike; what is not trained is held once for both.

    In bfloat16 it is held in that type.
    """
    dtype = unwrap(model).compute_dtype
    other: nn.Module = copy.deepcopy(unwrap(model).skeleton[0])
    copies = {id(weight): _frozen(weight, dtype) for weight in model.parameters()}
    ours = dict(model.named_parameters(remove_duplicate=False))
    places = [(name, copies[id(weight)]) for name, weight in ours.items()]
    _set(other, [(name, weight) for name, weight in places if not is_sharded(weight)])
    _wrap(other, {id(weight) for _, weight in places}, dtype)
    _set(other, [(name, weight) for name, weight in places if is_sharded(weight)])
    other.to(unwrap(model).device)
    unwrap(other)._get_fsdp_state()._lazy_init()  # which takes the weights that were just set
    return other


def _frozen(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A weight itself, if nothing trains it; else a copy."""
    part = own_part(weight.detach())
    if weight.requires_grad:
        part = part.to(dtype, copy=True) if is_sharded(weight) else part.clone()
    return nn.Parameter(like(weight, part), requires_grad=False)


def _set(model: nn.Module, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    for name, weight in weights:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, weight)
