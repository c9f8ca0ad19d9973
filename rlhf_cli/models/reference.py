"""The frozen policy that KL terms and DPO compare with."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.models.adapters import (
    BELOW,
    POLICY,
    REFERENCE,
    Acting,
    add_adapter,
    below,
    can_lend,
    copy_adapter,
    hold_adapter,
    is_adapted,
    is_fresh,
    unite,
    weights_of,
)
from rlhf_cli.models.masters import put
from rlhf_cli.models.sharding import hash_of_ranks, is_in_parts, let_go, twin
from rlhf_cli.models.shards import own_part


class Reference:
    """The policy as the stage began, or as `refresh` last found it; frozen.

    Of a full model it is a copy, but for frozen layers, which both share. Of an adapted one the
    base weights exist once: a fresh adapter is switched off, since it adds nothing yet; one that
    was trained before is copied, the adapter alone. Where it trains weights of the base itself, all
    that it trains is copied, as of a full model. `Reference.of` takes another model as it is.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._refreshed = False
        lends = is_adapted(policy) and can_lend(policy)
        self._adapted: Any = policy if lends else None
        self.switched_off = self._adapted is not None and is_fresh(policy)
        if self._adapted is None:
            self.model: nn.Module = _copy_of(policy)
        else:
            self.model = policy
            unite(self._adapted)
            if not self.switched_off:
                self._copy_adapter()
        self.hash = self.digest()

    @classmethod
    def of(cls, model: nn.Module) -> "Reference":
        """Another model, frozen; it is not copied."""
        reference = cls.__new__(cls)
        reference.model = reference._policy = model.requires_grad_(False)
        reference._adapted, reference._refreshed = None, False
        reference.switched_off = False
        reference.hash = reference.digest()
        return reference

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference model, without gradient; an adapted policy is it within this block."""
        with torch.no_grad():
            if self._adapted is None:
                yield self.model
            else:
                own = [] if self.switched_off else [REFERENCE]
                with Acting(self._adapted, *below(self._adapted), *own):
                    yield self.model

    def _copy_adapter(self) -> None:
        """The policy's adapter as it is now becomes the reference's."""
        if REFERENCE not in self._adapted.peft_config:
            add_adapter(self._adapted, REFERENCE, self._adapted.peft_config[POLICY])
        copy_adapter(self._adapted, POLICY, REFERENCE)
        hold_adapter(self._adapted, REFERENCE)
        self.switched_off = False

    # ------------------------------------------------------------------ iterative training

    @torch.no_grad()
    def refresh(self) -> None:
        """The reference becomes the policy as it is now (iterative GRPO, 2402.03300 alg. 1)."""
        if self._adapted is not None:
            self._copy_adapter()
        else:
            ours = dict(self._policy.named_parameters())
            for name, weight in self._own().items():
                own_part(weight).copy_(own_part(ours[name]))
        self._refreshed = True
        self.hash = self.digest()

    def tensors(self) -> dict[str, Tensor]:
        """What a resume point keeps of a reference that was refreshed; else nothing."""
        own = self._own() if self._refreshed else {}
        return {name: weight.detach() for name, weight in own.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        if not tensors:
            return
        self.refresh()  # it now has the weights that are to be replaced
        for name, weight in self._own().items():
            put(weight, tensors[name])
        self.hash = self.digest()

    def _own(self) -> dict[str, nn.Parameter]:
        """The weights that the policy does not share."""
        let_go(self.model)
        if self._adapted is not None:
            return weights_of(self._adapted, REFERENCE)
        ours = dict(self._policy.named_parameters())
        shared = {id(weight) for weight in ours.values()}
        if is_in_parts(self.model):  # whose twin shares memory, not parameters
            shared = {id(w) for name, w in self.model.named_parameters() if is_frozen(ours[name])}
        return {
            name: weight
            for name, weight in self.model.named_parameters()
            if id(weight) not in shared
        }

    def digest(self) -> str:
        """Hash of the weights that make up the reference, to prove that they did not move."""
        let_go(self.model)
        others: set[str] = set()
        if self._adapted is not None:
            others = set(self._adapted.peft_config) - {REFERENCE, BELOW}
        digest = hashlib.sha256()
        # sorted: peft takes experts out of their module for a pass, and puts them back at its end
        for name, weight in sorted(self.model.named_parameters()):
            if others.isdisjoint(name.split(".")):
                part = own_part(weight.detach()).cpu().contiguous()
                digest.update(part.view(torch.uint8).numpy().tobytes())
        return hash_of_ranks(digest.digest()) if is_in_parts(self.model) else digest.hexdigest()


def _copy_of(policy: nn.Module) -> nn.Module:
    if is_in_parts(policy):
        return twin(policy)
    shared = {id(weight): weight for weight in policy.parameters() if is_frozen(weight)}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def is_frozen(weight: nn.Parameter) -> bool:
    """Whether training leaves a weight as it is."""
    return not weight.requires_grad
