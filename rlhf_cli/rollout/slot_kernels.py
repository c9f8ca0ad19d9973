"""A token's keys and values written into slots by one kernel for CUDA: see `SlotCache`.

torch has a kernel for each of the two, which finds the place of every number by itself.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _append(  # type: ignore[no-untyped-def]
    keys,
    values,
    new_keys,
    new_values,
    places,
    key_slot,
    key_head,
    key_place,
    value_slot,
    value_head,
    value_place,
    new_key_slot,
    new_key_head,
    new_value_slot,
    new_value_head,
    key_width,
    value_width,
    WIDTH: tl.constexpr,
):
    """One head of one slot."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(places + slot)
    at = tl.arange(0, WIDTH)
    there = at < key_width
    key = tl.load(new_keys + slot * new_key_slot + head * new_key_head + at, mask=there)
    tl.store(keys + slot * key_slot + head * key_head + place * key_place + at, key, mask=there)
    there = at < value_width
    value = tl.load(new_values + slot * new_value_slot + head * new_value_head + at, mask=there)
    target = values + slot * value_slot + head * value_head + place * value_place + at
    tl.store(target, value, mask=there)


def append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, places: Tensor
) -> None:
    """Write (B, H_kv, 1, d) keys and values to (B,) places of (B, H_kv, capacity, d) slots.

    The last axis of each has no gaps.
    """
    slots, heads, _, width = new_keys.shape
    strides = (*keys.stride()[:3], *values.stride()[:3])
    new_strides = (*new_keys.stride()[:2], *new_values.stride()[:2])
    widths = width, new_values.shape[-1]
    _append[(slots, heads)](
        *(keys, values, new_keys, new_values, places),
        *strides,
        *new_strides,
        *widths,
        triton.next_power_of_2(max(widths)),
        num_warps=1,
    )
