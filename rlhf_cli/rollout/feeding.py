"""How a model is to be fed column by column: found out on the loaded model itself.

Families differ in what they keep of the tokens that they have read, in the argument that takes it
back, in the mask that a single column wants, and in whether a pad on the left leaves a trace in a
state that runs along the row. Names tell little of it: each way is tried on a few tokens, and the
first that gives what a pass over whole rows gives is taken.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import embedding_rows, hidden_states, trunk, unwrap
from rlhf_cli.models.out_of_memory import ran_out
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.state import State, Way

Result = TypeVar("Result")

PROMPT, SHORT = 5, 2  # tokens of the two prompts that are tried
CARRIED = PROMPT + 2
LONG = 24  # columns in which an error that adds up would show
SAME = 1e-5  # share of the states that rounding in float32 may make of them, by and large
LEAK = 1e-3  # share that is far above it, and far below what a wrong state makes
ROUNDED = 5e-2  # the same where weights or products are rounded to fewer bits

_WAYS: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


def way_of(model: nn.Module) -> Way:
    """How this model, in evaluation mode, is to be fed; tried once, and said where it is slow.

    Where its states are not finite nothing can be tried, and sampling will stop at its logits.
    """
    body = trunk(model)
    if body not in _WAYS:
        way = _Probe(model).best_way()
        if way is None:
            return Way(padded=True)
        _WAYS[body] = way
        name = type(unwrap(model)).__name__
        if way.argument is None:
            say(
                f"{name} keeps nothing that sampling could go on from: each token reads the whole "
                "text before it again, which is slow"
            )
        elif way.alone:
            say(f"{name} mixes up the rows of a batch: responses are sampled one by one, slowly")
        elif not way.padded:
            say(f"{name} sees pads: only prompts of the same length are sampled side by side")
    return _WAYS[body]


def reorders(model: nn.Module) -> bool:
    """Whether transformers' beam search moves the whole state of this model from beam to beam."""
    way = way_of(model)
    if way.argument is None or way.held or way.alone:
        return False
    return _Probe(model).reorders(way)


class _Probe:
    """Two rows of a few random tokens, and what a pass over whole rows says of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        device = next(model.parameters()).device
        size = embedding_rows(model)
        pad = getattr(unwrap(model).get_input_embeddings(), "padding_idx", None)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (2, LONG), generator=draw)
        if pad is not None:
            ids[ids == pad] = (pad + 1) % size  # one whose embedding is zero would ask no state
        self._ids = ids.to(device)
        types = {each.dtype for each in model.parameters()}
        self._limit = LEAK if types == {torch.float32} else ROUNDED

    @torch.no_grad()
    def best_way(self) -> Way | None:
        """The first way that is right for padded rows too, else the first that is right.

        None where the model's states are not finite.
        """
        whole = self._whole()
        if not whole.isfinite().all():
            return None
        right: list[Way] = []
        for way in self._ways():
            if right and (right[-1].padded or way.alone):
                break
            known = _unless_it_fails(partial(self._with_axes, way))
            if known and _unless_it_fails(partial(self._carries, known, whole)):
                padded = bool(_unless_it_fails(partial(self._pads, known, whole)))
                right.append(replace(known, padded=padded))
        best = next((way for way in right if way.padded), right[0] if right else Way())
        return replace(best, exact=self._exact(best, whole))

    @torch.no_grad()
    def reorders(self, way: Way) -> bool:
        """Whether the state's own reordering leaves nothing of it behind."""

        def moved() -> bool:
            state = State(self._model, way)
            self._read(state, [0, 1], PROMPT)
            state.kept.reorder_cache(torch.tensor([1, 0], device=self._ids.device))
            return self._near(self._read(state, [1, 0], PROMPT + 1), whole[[1, 0], PROMPT])

        whole = self._whole()
        return bool(_unless_it_fails(moved))

    def _ways(self) -> Iterator[Way]:
        """What may be right, by the arguments and outputs of the decoder's forward; best first."""
        body = trunk(self._model)
        taken = inspect.signature(body.forward).parameters
        output = _unless_it_fails(lambda: body(input_ids=self._ids[:1], use_cache=True)) or ()
        own = [Way(name) for name in output if name in taken]
        made = [Way("past_key_values", made=True)] if "past_key_values" in taken else []
        for alone in (False, True):
            for way in made + own:
                yield from (replace(way, alone=alone, masked=each) for each in (True, False))
        yield Way()

    def _whole(self) -> Tensor:
        """The last hidden states of both rows, as training has them: (2, LONG, d)."""
        rows = [Tokens(ids[:1], ids[1:]) for ids in self._ids.tolist()]
        return hidden_states(self._model, collate(rows, self._ids.device))

    def _with_axes(self, way: Way) -> Way:
        """The way, and where the rows are: along the axis that is twice as long for two of them."""
        if way.alone:
            return way
        one, two = self._shapes(way, 1), self._shapes(way, 2)
        axes = {}
        for place, shape in two.items():
            pairs = enumerate(zip(one.get(place, shape), shape, strict=True))
            longer = [axis for axis, (short, long) in pairs if long == 2 * short > 0]
            if len(longer) == 1:
                axes[place] = longer[0]
        held = tuple(name for name in self._held() if name in axes)
        return replace(way, axes=axes, held=held)

    def _shapes(self, way: Way, rows: int) -> dict[str, torch.Size]:
        """The shapes of all tensors that are left of some rows, those that modules hold too."""
        state = State(self._model, way)
        for width in (PROMPT, PROMPT + 1):
            self._read(state, list(range(rows)), width)
        return {name: each.shape for name, each in (state.tensors() | self._held()).items()}

    def _held(self) -> dict[str, Tensor]:
        """Tensors that are attributes of modules, but neither parameters nor buffers."""
        return {
            f"{name}.{attribute}": value
            for name, module in trunk(self._model).named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def _carries(self, way: Way, whole: Tensor) -> bool:
        """Whether rows that are repeated and selected go on as the whole rows have it."""
        state = State(self._model, way)
        rows = [0] if way.alone else [0, 1]
        found = [self._near(self._read(state, rows, PROMPT), whole[rows, PROMPT - 1])]
        if not way.alone:
            state.repeat(2)  # rows 0 0 1 1
        for width, places, chosen in ((PROMPT + 1, [3, 0], [1, 0]), (CARRIED, [1, 1], [0, 0])):
            if not way.alone:
                state.select(torch.tensor(places, device=self._ids.device))
                rows = chosen
            found.append(self._near(self._read(state, rows, width), whole[rows, width - 1]))
        return all(found)

    def _exact(self, way: Way, whole: Tensor) -> bool:
        """Whether a state that does not grow is, many columns on, what whole rows make of it."""
        state = State(self._model, way)
        before: dict[str, torch.Size] = {}
        for width in range(PROMPT, LONG + 1):
            hidden = self._read(state, [0], width)
            shapes = {place: tensor.shape for place, tensor in state.tensors().items()}
            if before and all(before.get(place) != shape for place, shape in shapes.items()):
                return True  # keys and values only, which nothing adds up in
            if before and not self._near(hidden, whole[[0], width - 1], SAME):
                return False
            before = shapes
        return True

    def _pads(self, way: Way, whole: Tensor) -> bool:
        """Whether a short row that is padded on the left beside a long one goes on as alone."""
        pads = PROMPT - SHORT
        short = torch.cat([self._ids[1, :1].expand(pads), self._ids[1, : CARRIED - pads]])
        seen = torch.stack([self._ids[0, :CARRIED], short])  # (2, CARRIED)
        attention = torch.ones_like(seen, dtype=torch.bool)
        attention[1, :pads] = False
        state = State(self._model, way)
        found = []
        for width in range(PROMPT, CARRIED + 1):
            hidden = state.read(seen[:, :width], attention[:, :width])
            alone = torch.stack([whole[0, width - 1], whole[1, width - pads - 1]])
            found.append(self._near(hidden, alone))
        return all(found)

    def _read(self, state: State, rows: list[int], width: int) -> Tensor:
        """The states of the last of so many columns of some rows, (R, d)."""
        seen = self._ids[rows, :width]
        return state.read(seen, torch.ones_like(seen, dtype=torch.bool))

    def _near(self, ours: Tensor, theirs: Tensor, limit: float | None = None) -> bool:
        away = (ours - theirs).float().norm(dim=-1)  # (R,)
        return bool((away <= (limit or self._limit) * theirs.float().norm(dim=-1)).all())


def _unless_it_fails(work: Callable[[], Result]) -> Result | None:
    """What a trial gives; None where the model refuses it, which models do in many ways."""
    try:
        return work()
    except Exception as error:
        if ran_out(error):
            raise
        return None
