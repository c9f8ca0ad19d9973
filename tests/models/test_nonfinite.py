"""The tensor that holds what is not finite is named."""

import pytest
import torch

from rlhf_cli.models.nonfinite import first_nonfinite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_tensor_is_named(bad: float) -> None:
    tensors = {
        "steps": torch.arange(3),
        "fine": torch.tensor([1e38, -1e-45]),
        "half": torch.tensor([[1.0, bad]], dtype=torch.bfloat16),
        "after": torch.tensor(bad),
    }
    assert first_nonfinite(tensors) == "half"


def test_finite_and_empty_tensors_are_fine() -> None:
    assert first_nonfinite({"a": torch.zeros(0), "b": torch.tensor(True)}) is None
