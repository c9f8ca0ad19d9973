"""The head's own backward pass: against whole logits in float64, kept or computed once more."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.data.batches import collate
from rlhf_cli.models import logprob_rows
from rlhf_cli.models.decoder import linear_head
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.logprob_head import HeadScores, LinearHead, head_scores
from tests.toys import llama, sequences_of

ROWS, SIZE, WIDTH = 13, 5000, 16  # so many columns that a CPU takes the rows in several blocks


def leaves(dtype: torch.dtype, bias: bool, device: str = "cpu") -> list[Tensor]:
    """States, weight and bias, whose logits reach from -16 to 16."""
    torch.manual_seed(3)
    shapes = [(ROWS * 10, WIDTH), (SIZE, WIDTH)] + [(SIZE,)] * bias
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [each.to(device, dtype).requires_grad_() for each in drawn]


def scored(given: list[Tensor], *, reference: bool = False, **options: Any) -> HeadScores:
    states, weight, *bias = given
    dtype = states.dtype
    head = LinearHead(weight, bias[0] if bias else None, dtype)
    other = None
    if reference:
        other = LinearHead((weight * 0.9).to(dtype), None, dtype), states * 0.8
    return head_scores(head, states, targets(states), reference=other, **options)


def targets(states: Tensor) -> Tensor:
    return (torch.arange(len(states)) * 7 % SIZE).to(states.device)


def whole(given: list[Tensor], temperature: float, reference: bool) -> list[Tensor]:
    """The same of all logits at once, by autograd."""
    states, weight, *bias = given
    logits = (states @ weight.T + (bias[0] if bias else 0)) / temperature
    ours = logits.log_softmax(-1)
    theirs = ((states * 0.8).detach() @ (weight * 0.9).detach().T / temperature).log_softmax(-1)
    return [
        ours.gather(-1, targets(states)[:, None])[:, 0],
        -(ours.exp() * ours).sum(-1),
        (ours.exp() * (ours - theirs)).sum(-1) if reference else torch.zeros_like(ours[:, 0]),
    ]


def objective(figures: list[Tensor | None]) -> Tensor:
    """A sum in which every row of every figure weighs something else."""
    weights = torch.linspace(-1, 2, ROWS * 10)
    known = [each for each in figures if each is not None]
    return sum((each * (i + weights.to(each))).sum() for i, each in enumerate(known))  # type: ignore[return-value]


def compare(found: HeadScores, given: list[Tensor], temperature: float, tolerance: float) -> None:
    exact = [each.detach().cpu().double().requires_grad_() for each in given]
    figures = [found.logprobs, found.entropy, found.kl]
    expected = whole(exact, temperature, found.kl is not None)
    asked = [one if each is not None else None for one, each in zip(expected, figures, strict=True)]
    for ours, theirs in zip(figures, asked, strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(
                ours.cpu().double(), theirs, rtol=tolerance, atol=10 * tolerance
            )
    first = torch.autograd.grad(objective(figures), given, retain_graph=True)
    again = torch.autograd.grad(objective(figures), given)
    grads = torch.autograd.grad(objective(asked), exact)
    for one, other, grad in zip(first, again, grads, strict=True):
        assert (one.cpu().double() - grad).norm() <= tolerance * grad.norm()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [50, 1000])
@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, False),
        ({"with_entropy": True, "temperature": 0.7}, True),
        ({"with_entropy": True, "reference": True, "temperature": 1.5}, False),
    ],
)
def test_values_and_gradients_are_those_of_the_whole_logits(
    chunk: int, options: dict[str, Any], bias: bool
) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        given = leaves(dtype, bias)
        found = scored(given, chunk=chunk, **options)
        compare(found, given, options.get("temperature", 1.0), tolerance)


def test_nothing_of_the_vocabularys_size_is_kept_and_a_frozen_head_gets_no_gradient() -> None:
    states, weight = leaves(torch.float32, False)
    kept: list[int] = []

    def keep(each: Tensor) -> Tensor:
        kept.append(each.numel())
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        found = scored([states, weight.detach()], chunk=50, with_entropy=True)
    assert sum(kept) < weight.numel() + 20 * states.numel()
    found.logprobs.sum().backward()
    assert states.grad is not None and weight.grad is None


def test_a_bfloat16_heads_gradient_is_summed_in_float32() -> None:
    """100 rows that each add 1/512 of the first one's size: in bfloat16 the sum would not move."""
    weight: Any = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    states = torch.tensor([[1.0]] + [[2.0**-9]] * 100, dtype=torch.bfloat16)
    head = LinearHead(weight, None, torch.bfloat16)
    targets = torch.zeros(101, dtype=torch.long)
    sums = []
    for chunk in (1, 1000):
        weight.grad = None
        head_scores(head, states, targets, chunk=chunk).logprobs.sum().backward()
        sums.append(weight.grad[0].item())
    assert sums == [pytest.approx(0.75 * (1 + 100 / 512), rel=2**-8)] * 2


def test_a_head_with_a_hook_or_an_adapter_is_asked_itself() -> None:
    model, batch = llama(), collate(sequences_of(7))
    plain = token_logprobs(model, batch, chunk=5).logprobs
    assert linear_head(model) is not None
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert linear_head(model) is None
    doubled = token_logprobs(model, batch, chunk=5, temperature=2.0).logprobs
    torch.testing.assert_close(doubled, plain)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.lm_head.__class__ = Scaled
    model.lm_head._forward_hooks.clear()
    assert linear_head(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [50, 1000])
def test_kernels_give_what_the_plain_passes_give(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert logprob_rows._kernels() is not None
    options: dict[str, Any] = {"with_entropy": True, "reference": True, "temperature": 1.5}
    given = leaves(torch.float32, True, "cuda")
    compare(scored(given, chunk=chunk, **options), given, 1.5, 1e-5)
    found = {}
    given = leaves(torch.bfloat16, False, "cuda")
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(logprob_rows, "_kernels", lambda: None)
        figures = scored(given, chunk=chunk, **options)
        columns = [figures.logprobs, figures.entropy, figures.kl]
        found[kernels] = columns, torch.autograd.grad(objective(columns), given)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    for ours, plain in zip(found[True][1], found[False][1], strict=True):
        assert (ours - plain).norm() <= 0.01 * plain.norm()
