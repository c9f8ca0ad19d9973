"""Whether a model goes on in slots as a pass over whole rows has it: tried on the loaded model.

Families differ in whether their attention can be given another layout, and in whether keys and
values are all that they keep. A short trial shows it, with windows made as short; whatever goes
wrong in it leaves the model to the plain decoder (rollout/decode.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.models.decoder import (
    embedding_rows,
    hidden_states,
    matmul_in_float32,
    trunk,
    unwrap,
)
from rlhf_cli.models.out_of_memory import ran_out
from rlhf_cli.models.row_attention import laid_out
from rlhf_cli.reporting.console import say
from rlhf_cli.rollout.feeding import LEAK, ROUNDED
from rlhf_cli.rollout.prompt_slots import PromptTable
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slots import SlotTable

TRIED = 20  # tokens of the two rows that are tried
SHORT = 6  # tokens that windows are made of meanwhile
WINDOWS = ("sliding_window", "attention_chunk_size")  # as configs and attentions call them
BY_LENGTH = ("dynamic", "longrope")  # positions that change with the longest row of a batch

_APART: WeakSet[nn.Module] = WeakSet()  # decoders whose slots share nothing
_FITS: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def fits_slots(model: nn.Module, reach: int) -> bool:
    """Whether this model, in evaluation mode, may be sampled in slots of `reach` tokens.

    Tried once, and once more where slots reach beyond a window; said where it may not. Where its
    states are not finite nothing can be tried, and the plain decoder will stop at its logits.
    """
    known = _FITS.setdefault(trunk(model), {})
    beyond = any(window < reach for _, _, window in _windows(model))
    if beyond not in known:
        found = _tried(model, beyond)
        if found is None:
            return False
        known[beyond] = found
        if not found:
            if not beyond:  # then longer ones do not fit either
                known[True] = False
            _say_padded(model)
    return known[beyond] and not _changes(model, reach)


def give_up_slots(model: nn.Module) -> None:
    """Do not sample this model in slots any more."""
    _FITS[trunk(model)] = dict.fromkeys((True, False), False)
    _say_padded(model)


def _say_padded(model: nn.Module) -> None:
    say(
        f"{type(unwrap(model)).__name__} is not sampled in slots: its prompts are padded, and a "
        "batch lasts as long as its longest response"
    )


def table_for(model: nn.Module) -> type[SlotTable]:
    """The slots that fit this model: on a CPU those that share what they keep of a prompt."""
    on_gpu = next(model.parameters()).is_cuda
    return SlotTable if on_gpu or trunk(model) in _APART else PromptTable


def _tried(model: nn.Module, beyond: bool) -> bool | None:
    """Whether slots give what whole rows give; None where that is not finite or memory runs out.

    Args:
        beyond: whether windows are to end within the rows.
    """
    found = _tried_in(table_for(model), model, beyond)
    if found is False and table_for(model) is PromptTable:
        _APART.add(trunk(model))  # such as one that makes its keys of what the cache returns
        found = _tried_in(SlotTable, model, beyond)
    return found


@torch.no_grad()
def _tried_in(table: type[SlotTable], model: nn.Module, beyond: bool) -> bool | None:
    try:
        with _short_windows(model) if beyond else nullcontext():
            types = {each.dtype for each in model.parameters() if each.is_floating_point()}
            if types == {torch.float32}:  # where rounding hides nothing
                with _in_float32(model):
                    found = _same(table, model, LEAK)
                if not found or matmul_in_float32(model):
                    return found
            return _same(table, model, ROUNDED)
    except Exception as error:  # models refuse what they do not know in many ways
        return None if ran_out(error) else False


def _same(table: type[SlotTable], model: nn.Module, limit: float) -> bool | None:
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding_rows(model), (2, TRIED), generator=draw)
    rows = ids.tolist()
    whole = hidden_states(model, collate([Tokens(row[:1], row[1:]) for row in rows], device))
    if not whole.isfinite().all():
        return None
    trial = _Trial(table, model, rows, whole)
    trial.begin([(0, 0, 9), (1, 0, 9), (2, 1, 1)])  # two of one prompt, and one to begin with
    found = [trial.near(3, limit) for _ in range(3)]
    trial.begin([(3, 1, 8)])  # beside those that run
    found += [trial.near(4, limit) for _ in range(2)]
    trial.move(3, 0)
    found += [trial.near(3, limit) for _ in range(6)]
    return all(found)


class _Trial:
    """Slots that read what stands in some rows."""

    def __init__(
        self, table: type[SlotTable], model: nn.Module, rows: list[list[int]], whole: Tensor
    ) -> None:
        """`whole`: (R, TRIED, d) states of a pass over them."""
        self._model, self._rows, self._whole = model, rows, whole
        self._table = table(model, Sampling(TRIED), [], 4, 2 * TRIED)
        self._next: dict[int, tuple[int, int]] = {}  # row and place of what a slot reads next

    def begin(self, starts: list[tuple[int, int, int]]) -> None:
        """Begin slots with so many tokens of a row."""
        prompts: dict[tuple[int, int], list[int]] = {}
        for slot, row, length in starts:
            prompts.setdefault((row, length), self._rows[row][:length])
            self._next[slot] = row, length - 1
        noise = torch.zeros(len(starts), TRIED)
        own = [prompts[row, length] for _, row, length in starts]
        self._table.start([slot for slot, _, _ in starts], own, noise)

    def move(self, source: int, target: int) -> None:
        """What a slot holds goes to another."""
        self._table.move([source], [target])
        self._next[target] = self._next.pop(source)

    def near(self, count: int, limit: float) -> bool:
        """Whether the next states of the first slots are those of their rows."""
        table = self._table
        for slot, (row, place) in self._next.items():
            table.ids[slot], table.places[slot] = self._rows[row][place], place
            self._next[slot] = row, place + 1
        table.reach(max(place for _, place in self._next.values()))
        with laid_out(self._model, table.layout(count)):
            ours = table.read(count)
        theirs = torch.stack([self._whole[row, place] for row, place in self._expected(count)])
        away = (ours - theirs).float().norm(dim=-1)
        return bool((away <= limit * theirs.float().norm(dim=-1)).all())

    def _expected(self, count: int) -> list[tuple[int, int]]:
        return [(self._next[slot][0], self._next[slot][1] - 1) for slot in range(count)]


def _windows(model: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """Where the decoder's configs and layers hold the length of a window, and how long it is."""
    for module in trunk(model).modules():
        for owner in (module, getattr(module, "config", None)):
            for name in WINDOWS:
                window = getattr(owner, name, None)
                if isinstance(window, int) and window:
                    yield owner, name, window


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """All windows end within a few tokens in this block."""
    before = list(_windows(model))
    try:
        for owner, name, window in before:
            setattr(owner, name, min(window, SHORT))
        yield
    finally:
        for owner, name, window in reversed(before):
            setattr(owner, name, window)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Products in float32 within this block, whatever model.dtype."""
    base = unwrap(model)
    before = getattr(base, "compute_dtype", torch.float32)
    base.compute_dtype = torch.float32
    try:
        yield
    finally:
        base.compute_dtype = before


def _changes(model: nn.Module, reach: int) -> bool:
    """Whether positions in slots of so many tokens would hang on the longest of them."""
    return any(
        rope.get("rope_type") in BY_LENGTH
        and reach > rope.get("original_max_position_embeddings", 0)
        for rope in _ropes(unwrap(model).config.get_text_config().to_dict())
    )


def _ropes(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every dictionary of a config that tells how positions turn into angles."""
    for value in settings.values():
        if isinstance(value, dict):
            if "rope_type" in value:
                yield value
            yield from _ropes(value)
