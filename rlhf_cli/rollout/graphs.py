"""CUDA graphs of a step of slots, one for each number of slots, replayed while weights change.

A step of a small model is a thousand launches, which take the host ten times as long as the GPU;
a graph is one. It holds addresses, not values: weights that are updated in place are the new ones.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from rlhf_cli.models.decoder import unwrap
from rlhf_cli.rollout.pieces import Pieces
from rlhf_cli.rollout.slots import SlotTable

WARM = 2  # steps in which libraries set up their workspaces
OTHERS = 0.1  # share of the slots that may draw otherwise than in a step without a graph, but for
# one: noise may lie between what 16 bits make of two sums
ROUNDED = 5e-2  # share of the states that rounding to 16 bits may make
NEAR = 5e-2  # mean gap of the log-probs of the same draws, as 16 bits round


class GraphDiffers(Exception):
    """A graph does not do what the step does that it was made of."""


class StepGraphs:
    """The graphs of the steps of a table; used within its layout."""

    def __init__(self, table: SlotTable, pieces: Pieces | None = None) -> None:
        """None is made yet; they will hold these pieces of the model compiled."""
        self._table, self.pieces = table, pieces
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def step(self, rows: int) -> None:
        """What the table's own step does.

        Raises:
            Exception: a step cannot be captured, as libraries say in many ways; none was made.
        """
        if rows in self._graphs:
            self._graphs[rows].replay()
        else:
            self._graphs[rows] = self._captured(rows)

    def _captured(self, rows: int) -> torch.cuda.CUDAGraph:
        """A graph that has been replayed once, and has done what the step in it does.

        That step draws from states that are those of a plain one.
        """
        table = self._table
        before = _copy(table, table.slots)
        try:
            states = table.read(rows)
            graph = torch.cuda.CUDAGraph()
            with self.pieces or nullcontext():
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM):
                        table.step(rows)
                torch.cuda.current_stream().wait_stream(stream)
                _restore(table, before)
                check_near(states, table.read(rows))
                table.step(rows)
                plain = _copy(table, rows)
                _restore(table, before)
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    table.step(rows)
            graph.replay()
            check_alike(before, plain, _copy(table, rows))
        except Exception:
            _restore(table, before)
            raise
        return graph


def check_near(plain: Tensor, ours: Tensor) -> None:
    """Compare the (R, d) states that two steps draw from; compiled pieces round otherwise.

    Draws tell less: from flat logits the least rounding makes them others.

    Raises:
        GraphDiffers: they are further apart than rounding to 16 bits makes them.
    """
    plain, ours = plain.float(), ours.float()
    if plain.isfinite().all() and not (ours - plain).norm() <= ROUNDED * plain.norm():
        raise GraphDiffers("compiled, its states are others")


def check_alike(
    before: dict[str, Tensor], plain: dict[str, Tensor], ours: dict[str, Tensor]
) -> None:
    """Compare what two steps from the same state made of the first slots, (R, ...).

    Raises:
        GraphDiffers: they drew other tokens, or found other log-probs.
    """
    rows = len(plain["drawn"])
    live = ~before["ended"][:rows]
    at = before["drawn"][:rows, None].clamp(max=plain["tokens"].shape[1] - 1)
    tokens, others = (each["tokens"].gather(1, at)[live] for each in (ours, plain))
    logprobs, their = (each["logprobs"].gather(1, at)[live] for each in (ours, plain))
    same = tokens == others
    apart = (logprobs - their)[same].abs()
    wrong = int((~same).sum())
    if wrong > max(1, OTHERS * len(same)) or (same.any() and not apart.mean() <= NEAR):
        raise GraphDiffers("its graph draws otherwise than its step")


def _copy(table: SlotTable, rows: int) -> dict[str, Tensor]:
    return {name: tensor[:rows].clone() for name, tensor in table.state().items()}


def _restore(table: SlotTable, values: dict[str, Tensor]) -> None:
    for name, tensor in table.state().items():
        tensor.copy_(values[name])


def addresses(model: nn.Module) -> tuple[object, ...]:
    """What a graph of a model holds for good: where its tensors are, and which adapters act."""
    tensors = [*model.parameters(), *model.buffers()]
    acting = [
        str([vars(module).get(name) for name in ("_active_adapter", "_disable_adapters")])
        for module in model.modules()
        if "_active_adapter" in vars(module)
    ]
    products = getattr(unwrap(model), "compute_dtype", None)
    return (*(each.data_ptr() for each in tensors), *acting, products)
