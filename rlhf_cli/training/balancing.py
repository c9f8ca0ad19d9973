"""The loss that balances the load of experts, where a model's config or model.router_aux_coef asks.

It is no sum over items: the share of tokens that goes to each expert is that of the whole step.
So that no cut into micro-batches changes it, these shares are counted first, without gradient.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.config.errors import UserError
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.experts import decoder_of, routers_of
from rlhf_cli.models.router_watch import RouterWatch
from rlhf_cli.objectives.routing import (
    expert_counts,
    load_balancing_loss,
    loads,
    probability_sums,
)
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.training.diagnosis import draws_again
from rlhf_cli.training.figures import EVERYWHERE, Figures
from rlhf_cli.training.loss_term import LossTerm

COEFFICIENT = re.compile(r"(.*_)?aux_loss_(coef|alpha)|moe_loss_weight")  # in configs
CHOSEN = ("num_experts_per_tok", "top_k", "moe_top_k", "num_experts_per_token")


class Balanced:
    """A network whose routers' load is balanced.

    coef: weight of the loss in the objective.
    k: experts that a token goes to.
    """

    def __init__(self, watch: RouterWatch, coef: float, k: int) -> None:
        self.watch, self.coef, self.k = watch, coef, k
        self._counts: Tensor | None = None  # (E,) over the whole step
        self._tokens: Tensor | float = 0.0
        self._losses: list[Tensor] = []  # of parts of the step

    def begin(self) -> None:
        """Forget the step before."""
        self._counts, self._tokens = None, 0.0

    def begin_losses(self) -> None:
        """Forget the losses of passes that are done again; what was counted stays."""
        self._losses = []

    def count(self) -> None:
        """Add what was seen last to the counts of the step."""
        for scores, weights in self.watch.seen:
            counts = expert_counts(scores, weights, self.k)
            if self._counts is not None and len(self._counts) != len(counts):
                raise UserError(
                    f"routers over {len(self._counts)} and over {len(counts)} experts: their load "
                    "cannot be balanced together; model.router_aux_coef=0 leaves that out"
                )
            self._counts = counts if self._counts is None else self._counts + counts
            self._tokens = self._tokens + weights.sum()
        self.watch.seen = []

    def sum_over_ranks(self) -> None:
        """The counts are those of all ranks, of which some may have had nothing to count."""
        if world().size == 1:
            return
        own = None if self._counts is None else [float(self._tokens), *self._counts.tolist()]
        known = [row for row in world().from_all(own) if row is not None]
        if known:
            device = None if self._counts is None else self._counts.device
            total = torch.tensor(known, dtype=torch.float64, device=device).sum(0)
            self._tokens, self._counts = total[0].item(), total[1:]

    def loss(self) -> Tensor | float:
        """The part of the objective that was seen last, with gradient."""
        if self._counts is None or not self.watch.seen:
            return 0.0
        sums = torch.stack([probability_sums(*each) for each in self.watch.seen]).sum(0)
        self.watch.seen = []
        part = load_balancing_loss(self._counts, sums, self._tokens)
        self._losses.append(part.detach())
        return self.coef * part

    def tell(self, figures: Figures, prefix: str) -> None:
        """Add the loss of the step without its weight, and the loads of the busiest and idlest."""
        if self._counts is None:
            return
        for part in self._losses:  # of this rank; the counts are of all
            figures.add(f"{prefix}router/aux_loss", part)
        figures.place = EVERYWHERE
        each = loads(self._counts)
        figures.add(f"{prefix}router/load_max", each.max())
        figures.add(f"{prefix}router/load_min", each.min())


class LoadBalancing:
    """The routers of all networks that an optimizer trains, where their load is balanced."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        """Says once of each network what is done."""
        found = {name: balanced(name, network) for name, network in networks.items()}
        self._each = {name: one for name, one in found.items() if one is not None}

    @property
    def networks(self) -> list[str]:
        """The names of those whose load is balanced."""
        return list(self._each)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block whose passes the next `count` or `loss` is about."""
        with ExitStack() as stack:
            for one in self._each.values():
                stack.enter_context(one.watch.open())
            yield

    @torch.no_grad()
    def count(self, parts: Sequence[LossTerm]) -> None:
        """Count what goes to each expert over a whole step, of this rank."""
        for one in self._each.values():
            one.begin()
        rewind = draws_again()
        for part in parts:
            for batch in world().dealt(part.batches):
                with self.watching():
                    part.loss(batch)
                for one in self._each.values():
                    one.count()
            for batch in world().idle(part.batches):
                part.loss(batch)
        rewind()

    def sum_over_ranks(self) -> None:
        """From now on the counts are those of all ranks."""
        for one in self._each.values():
            one.sum_over_ranks()

    def begin_losses(self) -> None:
        """Before the passes whose losses `tell` is about."""
        for one in self._each.values():
            one.begin_losses()

    def loss(self) -> Tensor | float:
        """What a micro-batch that was watched adds to the objective."""
        return sum((one.loss() for one in self._each.values()), 0.0)

    def tell(self, figures: Figures) -> None:
        """Add those of the step; of a critic's routers they begin with its name."""
        place = figures.place
        for name, one in self._each.items():
            figures.place = place
            one.tell(figures, "critic/" if name == "critic" else "")


# --------------------------------------------------------------------------- what is asked for


def balanced(name: str, network: Any) -> Balanced | None:
    """The network with a watch on its routers, if their load is to be balanced.

    Says what is done, or what of the config is left out, the first time that it is asked.

    Raises:
        UserError: model.router_aux_coef is set for a model without routers.
    """
    base = unwrap(getattr(network, "lender", network))
    if not hasattr(base, "config"):
        return None  # a head on another network's trunk
    asked = getattr(base, "router_aux_coef", None)
    told = coefficient_in(base.config)
    asks = any(each.get("output_router_logits") for each in _levels(base.config.to_dict()))
    new = not hasattr(network, "router_watch")
    if asked is None and told is not None and not asks:
        key, value = told
        if new and routers_of(decoder_of(base)[1]):
            network.router_watch = None
            say(
                f"note: no load-balancing loss of the {name}'s routers: its config has {key}="
                f"{value:g} without output_router_logits; model.router_aux_coef={value:g} adds it"
            )
        return None
    coef = asked if asked is not None else told[1] if told is not None else 0.0
    if not coef:
        return None
    routers = routers_of(decoder_of(base)[1])
    if not routers:
        if asked is None:
            return None
        raise UserError(f"model.router_aux_coef={asked:g}: {type(base).__name__} has no routers")
    if new:
        network.router_watch = RouterWatch(network, routers)
        by = "model.router_aux_coef" if asked is not None else "as its config asks"
        say(f"load-balancing loss of the {name}'s {len(routers)} routers: weight {coef:g}, {by}")
    return Balanced(network.router_watch, coef, _chosen(base, routers[0].module))


def coefficient_in(config: Any) -> tuple[str, float] | None:
    """The weight of the loss that a config names, with its key."""
    text = config.get_text_config().to_dict()
    for level in _levels(text):
        for key, value in level.items():
            if COEFFICIENT.fullmatch(str(key)) and isinstance(value, int | float) and value:
                return str(key), float(value)
    return None


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and the configs in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


def _chosen(base: Any, router: nn.Module) -> int:
    """How many experts a token goes to."""
    places = [router, base, base.config.get_text_config()]
    nested = list(_levels(base.config.to_dict()))
    for name in CHOSEN:
        values = [getattr(place, name, None) for place in places]
        values += [level.get(name) for level in nested]
        for value in values:
            if isinstance(value, int) and value > 0:
                return value
    raise UserError(
        f"{type(base).__name__} does not say how many experts a token goes to, and their load "
        "cannot be balanced; model.router_aux_coef=0 leaves that out"
    )
