"""Steps on a GPU: nothing that is queued is waited for; compiled blocks give what plain ones do."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.transfer import together
from rlhf_cli.models.compiled import compile_blocks, run_plainly
from rlhf_cli.models.recompute import recompute_activations
from tests.models.test_compiled import LAYOUTS, gradients
from tests.toys import DEVICE, llama
from tests.training.test_figures import term_of

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the GPU is an error within the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_pass_never_waits_for_the_gpu(stage: str, dtype: torch.dtype) -> None:
    """In float32 attention goes by the lengths on the host, in bfloat16 by the flash kernels."""
    term = term_of(stage, dtype)

    def passes() -> None:
        for batch in term.batches:
            loss, _ = term.loss(batch)
            loss.backward()

    passes()  # what is made once is there
    with no_waiting():
        passes()


def test_one_copy_moves_all() -> None:
    tensors = [torch.arange(6).view(2, 3), torch.tensor([[True], [False]]), torch.arange(0)]
    for moved, own in zip(together(tensors, DEVICE), tensors, strict=True):
        assert moved.is_cuda and moved.dtype == own.dtype and torch.equal(moved.cpu(), own)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_compiled_blocks_give_the_gradients_of_plain_ones(share: float) -> None:
    """By the compiler that runs use, in float32."""
    torch._dynamo.reset()
    model = llama(num_hidden_layers=3).to(DEVICE)  # type: ignore[arg-type]
    expected: list[dict[str, Tensor]] = [gradients(model, lengths) for lengths in LAYOUTS]
    if share:
        recompute_activations(model, share)
    assert compile_blocks(model) == 3
    for lengths, plain in zip(LAYOUTS, expected, strict=True):
        torch.testing.assert_close(gradients(model, lengths), plain, atol=1e-4, rtol=1e-3)
    run_plainly(model)
