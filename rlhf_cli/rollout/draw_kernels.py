"""The draw as two kernels for CUDA, where no filter cuts, and the search of top-p: see `Chooser`.

Triton comes with torch on CUDA. The first kernel reads each logit once, in the type of the product,
and leaves a sum of each block of columns; the second finds the block, then the column in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # columns of a sum
PART, WARPS = 4096, 8  # columns that a program of the first kernel takes, and threads / 32 of it
SEARCH_WARPS, BITS = 16, 2  # threads / 32 that search a row, and bits of the result in a pass


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    logits,
    until,
    made,
    seen,
    row,
    at,
    stride,
    size,
    temperature,
    penalty,
    RULED: tl.constexpr,
    SEEN: tl.constexpr,
):
    """Logits of a row as they are, and after the repetition penalty, -inf where ruled out."""
    there = at < size
    raw = tl.load(logits + row * stride + at, mask=there, other=float("-inf"))
    raw = raw.to(tl.float32) / temperature
    z = raw
    if SEEN:
        marked = tl.load(seen + row * size + at, mask=there, other=0) != 0
        z = tl.where(marked, tl.where(z < 0, z * penalty, z / penalty), z)
    if RULED:
        barred = tl.load(made + row) < tl.load(until + at, mask=there, other=0)
        z = tl.where(barred, float("-inf"), z)
    return raw, z


@triton.jit
def _log_sum(tops, sums, row, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logarithm of a row's sum of exp(logit), of what its parts have."""
    part = tl.arange(0, PARTS)
    own = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(own, 0)
    sum_ = tl.load(sums + row * parts + part, mask=part < parts, other=0.0).to(tl.float64)
    return top + tl.log(tl.sum(sum_ * tl.exp(own - top).to(tl.float64), 0)).to(tl.float32)


@triton.jit
def _sum_blocks(  # type: ignore[no-untyped-def]
    logits,
    until,
    made,
    seen,
    sums,
    tops,
    raw_sums,
    raw_tops,
    stride,
    size,
    parts,
    temperature,
    penalty,
    RULED: tl.constexpr,
    SEEN: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp(logit - top of the part), summed by block; the same of the logits before filters."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    raw, z = _read(
        logits, until, made, seen, row, at, stride, size, temperature, penalty, RULED, SEEN
    )
    top = tl.max(z, 0)
    tl.store(tops + row * parts + part, top)
    weights = tl.exp(z - tl.where(top == float("-inf"), 0.0, top))
    blocks = part * (PART // BLOCK) + tl.arange(0, PART // BLOCK)
    tl.store(
        sums + row * parts * (PART // BLOCK) + blocks,
        tl.sum(tl.reshape(weights, (PART // BLOCK, BLOCK)), 1),
    )
    if RULED or SEEN:
        top = tl.max(raw, 0)
        tl.store(raw_tops + row * parts + part, top)
        weights = tl.exp(raw - tl.where(top == float("-inf"), 0.0, top))
        tl.store(raw_sums + row * parts + part, tl.sum(weights, 0))


@triton.jit
def _find_block(  # type: ignore[no-untyped-def]
    sums,
    tops,
    noise,
    row,
    parts,
    EACH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The greatest logit of a row, its sum, whether that is finite, the block, what is left."""
    part = tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf")), 0)
    blocks = parts * EACH
    block = tl.arange(0, BLOCKS)
    there = block < blocks
    sum_ = tl.load(sums + row * blocks + block, mask=there, other=0.0)
    own_top = tl.load(tops + row * parts + block // EACH, mask=there, other=float("-inf"))
    sum_ = sum_.to(tl.float64) * tl.exp(own_top - top).to(tl.float64)
    fine = tl.sum(sum_, 0) > 0  # no maximum would be NaN
    ends = tl.cumsum(sum_, 0)
    total = tl.max(ends, 0)
    target = tl.load(noise + row).to(tl.float64) * total
    before = tl.sum((ends <= target).to(tl.int32), 0)
    before = tl.minimum(before, blocks - 1)
    start = tl.max(tl.where(ends <= target, ends, 0.0), 0)
    return top, total, fine, before, target - start


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    logits,
    noise,
    until,
    made,
    seen,
    sums,
    tops,
    raw_sums,
    raw_tops,
    ids,
    logprobs,
    sound,
    stride,
    size,
    parts,
    temperature,
    penalty,
    RULED: tl.constexpr,
    SEEN: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The id at the noise of a row, as `Chooser` finds it, and its log-prob before filters."""
    row = tl.program_id(0).to(tl.int64)
    top, total, fine, before, left = _find_block(
        sums, tops, noise, row, parts, PART // BLOCK, PARTS, BLOCKS
    )
    at = before * BLOCK + tl.arange(0, BLOCK)
    _, z = _read(
        logits, until, made, seen, row, at, stride, size, temperature, penalty, RULED, SEEN
    )
    inside = tl.cumsum(tl.exp(z - top).to(tl.float64), 0)
    place = tl.sum((inside <= left).to(tl.int32), 0)
    # the last weight, if rounding left the target above the sum
    place = tl.minimum(place, tl.sum((inside < tl.max(inside, 0)).to(tl.int32), 0))
    id = tl.minimum(before * BLOCK + place, size - 1)

    if RULED or SEEN:
        whole = _log_sum(raw_tops, raw_sums, row, parts, PARTS)
    else:
        whole = top + tl.log(total).to(tl.float32)
    drawn = tl.load(logits + row * stride + id).to(tl.float32) / temperature
    tl.store(ids + row, id.to(tl.int64))
    tl.store(logprobs + row, drawn - whole)
    tl.store(sound + row, fine.to(tl.int8))


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    weights, shares, found, stride, size, PART: tl.constexpr, BITS: tl.constexpr
):
    """The greatest bit pattern at or above which weights sum up to a share, some bits a pass."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.load(shares + row)
    ways = tl.arange(0, 1 << BITS)
    low = tl.zeros((), tl.int32)
    for turn in tl.static_range(30 // BITS):
        step = 1 << (30 - (turn + 1) * BITS)
        least = (low + ways * step).to(tl.float32, bitcast=True)
        total = tl.zeros((1 << BITS,), tl.float64)
        for start in range(0, size, PART):
            at = start + tl.arange(0, PART)
            own = tl.load(weights + row * stride + at, mask=at < size, other=0.0)[None, :]
            total += tl.sum(tl.where(own >= least[:, None], own, 0.0), 1).to(tl.float64)
        enough = tl.sum((total >= share).to(tl.int32), 0)
        low += (tl.maximum(enough, 1) - 1) * step  # 0 has all, whatever the rounding of the share
    tl.store(found + row, low.to(tl.float32, bitcast=True))


def least_of(weights: Tensor, share: Tensor) -> Tensor:
    """As in `sampling`, of (B, V) float32 rows without gaps and (B, 1) shares: (B, 1)."""
    rows, size = weights.shape
    found = torch.empty_like(share)
    _search[(rows,)](
        weights, share, found, weights.stride(0), size, PART, BITS, num_warps=SEARCH_WARPS
    )
    return found


def draw(
    logits: Tensor,
    noise: Tensor,
    made: Tensor,
    until: Tensor | None,
    seen: Tensor | None,
    temperature: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) ids, log-probs before filters at the temperature, and whether rows are finite.

    Args:
        logits: (B, V) of any floating type, each row without gaps.
        noise, made: (B,).
        until: (V,) int32, the tokens that a response has before an id may come; None: all may.
        seen: (B, V) bool without gaps, where the penalty counts; None: nowhere.
    """
    rows, size = logits.shape
    parts = triton.cdiv(size, PART)
    blocks = parts * (PART // BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    sums, tops, raw_sums, raw_tops = empty(blocks), empty(parts), empty(parts), empty(parts)
    ids, logprobs, sound = empty(dtype=torch.long), empty(), empty(dtype=torch.bool)
    asked = (until is not None, seen is not None, PART, BLOCK)
    until = made if until is None else until  # some memory; it is not read
    seen = sound if seen is None else seen
    figures = (sums, tops, raw_sums, raw_tops)
    scalars = (logits.stride(0), size, parts, float(temperature), float(penalty))
    _sum_blocks[(rows, parts)](
        logits, until, made, seen.view(torch.uint8), *figures, *scalars, *asked, num_warps=WARPS
    )
    padded = triton.next_power_of_2(parts), triton.next_power_of_2(blocks)
    out = (ids, logprobs, sound.view(torch.uint8))
    _pick[(rows,)](
        logits,
        noise,
        until,
        made,
        seen.view(torch.uint8),
        *figures,
        *out,
        *scalars,
        *asked,
        *padded,
    )
    return ids, logprobs, sound
