"""What the routers of a network score while it runs, for the loss that balances their load."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.batches import Batch
from rlhf_cli.models.experts import Router


class RouterWatch:
    """The scores of a network's routers in the passes that it makes while the watch is open.

    seen: per router and pass (N, E) scores and (N,) how often each token counts.
    """

    def __init__(self, network: nn.Module, routers: list[Router]) -> None:
        self._network, self._routers = network, routers
        self._acting: tuple[str, ...] | None = None
        self.seen: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch within this block, under the adapters that act as it begins, and forget before."""
        self.seen = []
        self._acting = self._now()
        try:
            yield
        finally:
            self._acting = None

    def is_open(self) -> bool:
        """Whether the next pass is watched: by other adapters it is another role's."""
        return self._acting is not None and self._acting == self._now()

    def _now(self) -> tuple[str, ...]:
        return tuple(getattr(self._network, "acting", ()))

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Record a pass over a batch."""
        weights = batch.stands_for.flatten()

        def keep(router: Router) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                scores = output[router.index] if isinstance(output, tuple) else output
                self.seen.append((_by_token(scores, len(weights), router), weights))

            return hook

        handles = [each.module.register_forward_hook(keep(each)) for each in self._routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def watched(run: Callable[[nn.Module, Batch], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """A pass through a network that its watch, if it has an open one, records."""

    @wraps(run)
    def watching(model: nn.Module, batch: Batch) -> Tensor:
        watch = getattr(model, "router_watch", None)
        if watch is None or not watch.is_open():
            return run(model, batch)
        with watch.over(batch):
            return run(model, batch)

    return watching


def _by_token(scores: Tensor, tokens: int, router: Router) -> Tensor:
    """(N, E) scores of a router, whatever shape it gave them."""
    flat = scores.flatten(0, -2)
    if len(flat) != tokens:
        raise UserError(
            f"{router.name} scored {len(flat)} of {tokens} tokens, and the load of its experts "
            "cannot be balanced; model.router_aux_coef=0 leaves that out"
        )
    return flat
