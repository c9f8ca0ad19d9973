"""The chain of tiny stages that runs are killed in."""

from tests.training.conftest import chain

__all__ = ["chain"]
