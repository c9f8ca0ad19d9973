"""Filters and the draw, on logits that are worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_cli.rollout.sampling import Chooser, Drawn, Sampling, seen_in

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()  # ids 0 to 4
SEEN = torch.tensor([[3, 3]])


def chooser(stop_ids: list[int], **options: Any) -> Chooser:
    return Chooser(Sampling(99, **options), stop_ids, torch.device("cpu"))


def probabilities(logits: Tensor = LOGITS, generated: int = 9, **options: Any) -> Tensor:
    """After filters: (B, V)."""
    filters = chooser([0], **options)
    made = torch.full((len(logits),), generated)
    seen = seen_in(SEEN.expand(len(logits), -1), logits.shape[-1])
    scaled = logits / options.get("temperature", 1.0)
    weights = filters.weights(filters.allowed(scaled, made, seen))
    return weights / weights.sum(-1, keepdim=True)


def draw(logits: Tensor, noise: Tensor, **options: Any) -> Drawn:
    """At the third token of each row, with nothing seen."""
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    return chooser([0], **options)(logits, noise, torch.full((len(logits),), 2), nothing)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 4}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),  # the tie at the fourth is kept
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),  # .5 + .25 < .8 <= .875
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.25}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),  # .125 / .5 = .25 stays
        ({"temperature": 0.5}, [x * x / 0.3359375 for x in (0.5, 0.25, 0.125, 0.0625, 0.0625)]),
        ({"generated": 1, "min_tokens": 2}, [0, 0.5, 0.25, 0.125, 0.125]),
        ({"generated": 2, "min_tokens": 2}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        # log .0625 is negative, so it is multiplied: 2 ** -8
        ({"repetition_penalty": 2.0}, [x / 0.94140625 for x in (0.5, 0.25, 0.125, 2**-8, 0.0625)]),
        # temperature first, then top-p: at T = .5 the first holds .744
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0, 0]),
    ],
)
def test_a_worked_filter(options: dict[str, Any], expected: list[float]) -> None:
    assert probabilities(**options)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_positive_logit_is_divided_by_the_penalty() -> None:
    logits = torch.tensor([[3.0, -1.0, 3.0, -1.0]])
    seen = seen_in(torch.tensor([[0, 1, 1]]), 4)
    ours = chooser([], repetition_penalty=2.0).allowed(logits, torch.zeros(1), seen)
    assert ours.tolist() == [[1.5, -2.0, 3.0, -1.0]]


def test_neutral_options_change_no_bit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    plain = probabilities(logits)
    assert torch.equal(probabilities(logits, top_k=40, top_p=1.0, min_p=0.0), plain)
    assert torch.equal(probabilities(logits, repetition_penalty=1.0, min_tokens=9), plain)


def test_the_input_is_left_alone() -> None:
    logits = LOGITS.clone()
    everything: dict[str, Any] = {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "min_tokens": 5}
    for temperature in (0.7, 1.0, 0.0):
        draw(logits, torch.zeros(1), temperature=temperature, repetition_penalty=1.3, **everything)
    assert torch.equal(logits, LOGITS)


def test_log_odds_scale_with_one_over_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 9, dtype=torch.float64)
    for temperature in (0.1, 0.7, 3.0):
        warm = probabilities(logits, temperature=temperature).log()
        odds = warm[:, :1] - warm[:, 1:]
        expected = (logits[:, :1] - logits[:, 1:]) / temperature
        torch.testing.assert_close(odds, expected, rtol=0, atol=1e-10)


def test_minimum_tokens_count_for_each_row() -> None:
    """Row by row: the end is likeliest, and barred until there are three tokens; id 1 always."""
    logits = torch.tensor([[9.0, 5.0, 0.0, -1.0]]).expand(4, -1)
    choose = chooser([0], min_tokens=3, absent=(1,))
    drawn = choose(logits, torch.zeros(4), torch.tensor([0, 2, 3, 7]))
    assert drawn.ids.tolist() == [2, 2, 0, 0]


def naive_kept(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which ids are kept of a row of logits: sorted, and all that tie with the last one."""
    weights = torch.softmax(torch.tensor(row, dtype=torch.float64), -1).tolist()
    kept = sorted(range(len(row)), key=lambda id: -row[id])
    if top_k:
        kept = [id for id in kept if row[id] >= row[kept[:top_k][-1]]]
    whole = sum(weights[id] for id in kept)
    above = {id: sum(weights[i] for i in kept if row[i] > row[id]) for id in kept}
    kept = [id for id in kept if above[id] < top_p * whole]
    return {id for id in kept if weights[id] >= min_p * weights[kept[0]]}


@pytest.mark.parametrize("grid", [1e-9, 0.3])  # without ties and with many
def test_what_is_kept_is_what_sorting_keeps(grid: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(6, 300, generator=generator) * 3 / grid).round() * grid
    combinations: list[dict[str, Any]] = [
        {"top_k": 7, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.37, "min_p": 0.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.013},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.07},
    ]
    for options in combinations:
        kept = probabilities(logits, **options) > 0
        for row, ours in zip(logits.tolist(), kept, strict=True):
            assert set(ours.nonzero()[:, 0].tolist()) == naive_kept(row, **options)


@pytest.mark.parametrize("entries", [1, 3, 256, 700])
def test_draws_are_those_of_the_cumulative_sum_in_float64(entries: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, entries, generator=generator) * 4
    noise = torch.rand(4000, generator=generator)
    ends = torch.softmax(logits[0].double(), -1).cumsum(-1)
    expected = torch.searchsorted(ends, noise.double(), right=True).clamp(max=entries - 1)
    ours = draw(logits.expand(4000, -1), noise).ids
    other = ours != expected
    # what differs lies within rounding of a boundary
    boundary = ends[torch.minimum(ours, expected)[other]]
    assert ((noise[other] - boundary).abs() < 3e-7).all()
    assert other.sum() < 8


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9, "min_tokens": 9}])
def test_a_draw_depends_on_its_own_row_alone(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, 1000, generator=generator) * 2
    noise = torch.rand(9, generator=generator)
    together = draw(logits, noise, **options)
    for row in range(9):
        alone = draw(logits[row : row + 1], noise[row : row + 1], **options)
        assert alone.ids.item() == together.ids[row].item()
        assert alone.logprobs.item() == together.logprobs[row].item()
    among = logits.flip(0).repeat(3, 1)
    assert torch.equal(
        draw(among, noise.flip(0).repeat(3), **options).ids[:9].flip(0), together.ids
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "min_tokens": 9},
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.7, "top_p": 0.5, "min_p": 0.01},
        {"absent": (3, 4), "min_tokens": 9},
        {"repetition_penalty": 1.4, "absent": (3,), "temperature": 0.9},
    ],
)
def test_log_probs_are_those_before_any_filter(options: dict[str, Any]) -> None:
    """Of what is left too where nearly all weight is ruled out, the first row's."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(8, 40, generator=generator)
    logits[0, 0] = 200.0
    drawn = draw(logits, torch.rand(8, generator=generator), **options)
    assert drawn.sound.all()
    scaled = logits.double() / (options.get("temperature") or 1.0)
    expected = torch.log_softmax(scaled, -1).gather(-1, drawn.ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, expected.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 1}, {"min_tokens": 5}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_unsound(options: dict[str, Any], value: float) -> None:
    logits = torch.zeros(3, 300)
    logits[1, 290] = value
    logits[2, 1:200] = -torch.inf  # only ruled out
    found = draw(logits, torch.full((3,), 0.5), **options)
    assert found.sound.tolist() == [True, False, True]
    assert ((found.ids >= 0) & (found.ids < 300)).all()  # no place outside, whatever is there


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "absent": (7,)},
        {
            "temperature": 0.7,
            "top_k": 9,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 5,
        },
    ],
)
def test_a_step_waits_for_no_value(options: dict[str, Any]) -> None:
    """Fake tensors have none: reading one, or a shape that hangs on one, would fail."""
    with FakeTensorMode():
        logits = torch.empty(4, 1000)
        drawn = draw(logits, torch.empty(4), **options)
        assert [each.shape for each in drawn] == [(4,)] * 3


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 0.6}])
def test_draws_have_the_filtered_distribution(options: dict[str, Any]) -> None:
    """Pearson's statistic over 2e4 draws stays below the .999 quantile."""
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    expected = probabilities(logits, **options)[0] * 2e4
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(draw(logits.expand(20_000, -1), noise, **options).ids, minlength=12)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    quantile = {12: 31.26, 6: 20.52}.get(int(possible.sum()), 31.26)  # 11 and 5 degrees of freedom
    assert statistic < quantile


@pytest.mark.parametrize("entries", [4, 256, 300, 1024])
def test_the_ends_of_the_noise(entries: int) -> None:
    logits = torch.full((1, entries), -torch.inf)
    logits[0, 1], logits[0, entries - 2] = 0.0, 0.0
    almost_one = 1 - 2**-24  # the largest float32 that torch.rand gives
    noise = torch.tensor([0.0, 0.4999, 0.5, almost_one])
    assert draw(logits.expand(4, -1), noise).ids.tolist() == [1, 1, entries - 2, entries - 2]
    cold = draw(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.99]), temperature=0.0)
    assert cold.ids.tolist() == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("type_", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "min_tokens": 3, "absent": (5, 2000)},
        {"repetition_penalty": 1.3, "absent": (5,)},
        {"top_p": 0.8, "min_tokens": 3},
    ],
)
def test_kernels_draw_as_the_plain_passes_in_a_graph_too(
    options: dict[str, Any], type_: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(7)
    logits = torch.randn(64, 9001, generator=generator, device=device).to(type_) * 3
    noise = torch.rand(64, generator=generator, device=device)
    made = torch.arange(64, device=device) % 6
    seen = seen_in(torch.randint(9001, (64, 99), generator=generator, device=device), 9001)
    choose = Chooser(Sampling(99, **options), [0, 3], device)
    assert choose._kernels is not None
    ours = choose(logits, noise, made, seen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = choose(logits, noise, made, seen)
    graph.replay()
    assert all(map(torch.equal, ours, inside))
    monkeypatch.setattr(choose, "_kernels", None)
    plain = choose(logits, noise, made, seen)
    same = ours.ids == plain.ids
    assert same.sum() >= 63  # one may lie within rounding of a boundary
    torch.testing.assert_close(ours.logprobs[same], plain.logprobs[same], rtol=1e-5, atol=1e-5)
    # at places that no option rules out
    logits[7, 8000], logits[8, 4], logits[9, 100:] = torch.nan, torch.inf, -torch.inf
    graph.replay()
    assert inside.sound.logical_not().nonzero()[:, 0].tolist() == [7, 8]
