"""How a model may read a micro-batch: whether packed rows give what padded ones give is tried.

Attention must go by the layout that it is given, positions be the given ones, and no state run from
one sequence into the next. A short probe compares states and gradients, in float32 whatever
model.dtype, as a leak is to hide behind no rounding; where a GPU computes in bfloat16 by kernels of
its own, these are held against the same float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlhf_cli.config.schema.hardware import Hardware
from rlhf_cli.config.schema.keys import AUTO
from rlhf_cli.config.schema.models import EAGER, SDPA
from rlhf_cli.data.batches import Batch, collate, collate_answers
from rlhf_cli.data.items import Answers, Tokens
from rlhf_cli.data.packing import PACKED, PADDED, SHARED, SHARED_FROM, Layout
from rlhf_cli.models.decoder import (
    hidden_states,
    matmul_in_float32,
    text_ids,
    unwrap,
)
from rlhf_cli.models.keeping_up import keep_up
from rlhf_cli.models.sharding import gathered_in_float32
from rlhf_cli.models.shards import is_sharded
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say

SAME = 1e-4  # share of the norm that rounding in float32 may make
ROUNDED = 0.1  # share that rounding to bfloat16 may make, at many layers
NARROW = 3  # tokens of a window that is to show in the probe
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")


def batch_of(model: nn.Module, items: Sequence[Tokens | Answers], layout: Layout) -> Batch:
    """Items of one kind on the model's device: a grid over whole sequences, or over responses."""
    device = next(model.parameters()).device
    sequences = [each for each in items if isinstance(each, Tokens)]
    if sequences:
        return collate(sequences, device, layout)
    return collate_answers([each for each in items if isinstance(each, Answers)], device, layout)


def layout_of(model: nn.Module, hardware: Hardware) -> Layout:
    """How a model reads its micro-batches: as `hardware` allows, and as it was found to be right.

    It is tried once for each model; what keeps its rows padded is said then.
    """
    if hardware.packing != AUTO:
        return PADDED
    base = unwrap(_lender(model))
    if not hasattr(base, "row_layout"):
        base.row_layout, why = layout_of_all(*found_layout(model))
        if why:
            say(f"note: {why}")
    found: Layout = base.row_layout
    return found & Layout(packed=True, shared=hardware.share_prompts)


def layout_of_all(found: Layout, why: str) -> tuple[Layout, str]:
    """What the ranks have all found to be right: one may have lacked the memory to try it."""
    ways = [PADDED, PACKED, SHARED]
    least, why = min(world().from_all((ways.index(found), why)))
    return ways[least], why


def found_layout(model: nn.Module) -> tuple[Layout, str]:
    """The layout that gives what padded rows give, and what speaks against a better one."""
    base = unwrap(_lender(model))
    name = type(base).__name__
    try:
        attention = base.config.get_text_config()._attn_implementation
        if attention not in (SDPA, EAGER) or (attention == EAGER and base._supports_sdpa):
            return PADDED, f"rows of {name} stay padded: model.attention={attention}"
        probe = _Probe(model)
        if not probe.agrees(PACKED):
            return PADDED, f"rows of {name} stay padded: packed, they see each other"
        if not probe.agrees(SHARED):
            return PACKED, f"{name} computes a prompt once per response: shared, it is another"
    except Exception as error:  # models refuse what they do not know in many ways
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return PADDED, f"rows of {name} stay padded: {said}"
    return SHARED, ""


class _Probe:
    """Sequences of several lengths, and what a model makes of them in each layout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        known = text_ids(unwrap(_lender(model)))
        draw = torch.Generator().manual_seed(0)

        def ids(length: int) -> list[int]:
            places = torch.randint(len(known), (length,), generator=draw).tolist()
            return [known[place] for place in places]

        prompt = ids(SHARED_FROM + 2)
        self._sequences = [
            Tokens(prompt, ids(5)),
            Tokens(ids(2), ids(7)),
            Tokens(prompt, ids(1)),
            Tokens(ids(SHARED_FROM), ids(1)),
            Tokens(prompt, ids(4)),
        ]
        self._lengths = torch.tensor([len(each) for each in self._sequences])

    def agrees(self, layout: Layout) -> bool:
        """Whether states and gradients are those of padded rows, in narrow windows too.

        In float32, if the weights can be held so, and as the model runs, if that is otherwise.
        """
        weights = _lender(self._model).parameters()
        as_floats = all(weight.is_floating_point() for weight in weights)
        exact = keep_up(lambda: self._agrees_exactly(layout), None) if as_floats else None
        by_others = self._device.type == "cuda" and not matmul_in_float32(self._model)
        if exact and not by_others:
            return True
        return exact is not False and self._same(layout, ROUNDED)

    def _agrees_exactly(self, layout: Layout) -> bool:
        with _in_float32(self._model):
            if not self._same(layout, SAME):
                return False
            with _narrow(self._model) as narrowed:
                return not narrowed or self._same(layout, SAME)

    def _same(self, layout: Layout, limit: float) -> bool:
        ours, theirs = (self._states_and_slopes(each) for each in (layout, PADDED))
        return all(
            bool((mine - other).norm() <= limit * other.norm())
            for mine, other in zip(ours, theirs, strict=True)
        )

    def _states_and_slopes(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """States of all tokens, and the gradient of a sum of them by what each id is embedded as.

        (N, d), and (U, d) for the ids that come.
        """
        batch = collate(self._sequences, self._device, layout)
        with _quietly(self._model), _embedded(self._model) as embedded:
            hidden = hidden_states(self._model, batch).flatten(0, 1)
            steps = torch.arange(batch.at.shape[1])
            real = (steps < self._lengths[:, None]).to(self._device)  # (S, R)
            states = hidden[batch.at[real]].float()  # (N, d)
            draw = torch.Generator().manual_seed(1)
            weights = torch.randn(states.shape, generator=draw).to(states)
            (slopes,) = torch.autograd.grad((weights * states).sum(), embedded)
        ids, places = batch.ids[batch.attention].unique(return_inverse=True)
        by_id = torch.zeros(len(ids), slopes.shape[-1], device=self._device)
        by_id.index_add_(0, places, slopes.view(*batch.ids.shape, -1)[batch.attention].float())
        return states.detach(), by_id


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """With gradient, without dropout and not compiled, whatever mode the model is in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the token embeddings give within this block, to ask for its gradient."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = unwrap(model).get_input_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Weights in float32 within this block; after it they are where they were."""
    weights = [each for each in _lender(model).parameters() if not is_sharded(each)]
    held = {weight: weight.data for weight in weights}
    try:
        for weight, value in held.items():
            weight.data = value.float()
        with gathered_in_float32(model):
            yield
    finally:
        for weight, value in held.items():
            weight.data = value


@contextmanager
def _narrow(model: nn.Module) -> Iterator[bool]:
    """All windows of attention are so narrow within this block that a short text goes beyond them.

    Yields whether there is any.
    """
    modules = list(_lender(model).modules())
    configs = [
        each.config
        for each in modules
        if isinstance(getattr(each, "config", None), PreTrainedConfig)
    ]
    before: list[tuple[Any, str, int]] = []
    for place in {id(each): each for each in [*configs, *modules]}.values():
        for name in WINDOWS:
            value = vars(place).get(name)
            if isinstance(value, int) and value > NARROW:
                before.append((place, name, value))
    try:
        for place, name, _ in before:
            setattr(place, name, NARROW)
        yield bool(before)
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _lender(model: nn.Module) -> nn.Module:
    """The model whose modules compute: a scorer on another's base has none of its own."""
    lender: nn.Module = getattr(model, "lender", model)
    return lender
