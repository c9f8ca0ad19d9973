"""Reward models and critics in: a trunk with a scalar head, from a folder or from the policy."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema.models import FrozenModel, Model
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.integrity import check_weights_hash
from rlhf_cli.folders.manifest import RESPONSE, adapter_base, check_level, kind_of, level_of
from rlhf_cli.models.adapters import CRITIC, REWARD, can_lend, is_adapted
from rlhf_cli.models.adapting import adapt, check_adapter, rank_of
from rlhf_cli.models.classifiers import load_classifier
from rlhf_cli.models.decoder import embedding_rows, unwrap
from rlhf_cli.models.heads import init_head, scalar_head, width_of
from rlhf_cli.models.loading_faults import fits, told
from rlhf_cli.models.sharding import is_in_parts
from rlhf_cli.models.shared import critic_on_base, scorer_on_base, share_frozen
from rlhf_cli.models.tokenizers import fit_embeddings
from rlhf_cli.reporting.console import say

SCORING = "regression"  # what transformers calls a head whose numbers are no logits of a class


@fits
def load_scorer(
    path: str,
    config: FrozenModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    base: nn.Module | None = None,
) -> nn.Module:
    """A reward model, or a critic that starts as one: classifier with one label.

    Of whole responses it is a sequence classifier, of steps and tokens a token classifier.

    Args:
        base: the policy. Where the folder is an adapter on the base of an adapted policy, the
            scorer is one more adapter there; frozen layers of a full policy are shared if equal.

    Raises:
        UserError: the folder holds no scalar head, or weights are missing or unreadable.
    """
    named = adapter_base(path)
    if base is not None and is_adapted(base) and named is not None and _has_rows(base, tokenizer):
        trainable = rank_of(config) > 0
        role = _free_name(base, CRITIC if trainable else REWARD)
        check_weights_hash(path)
        check_adapter(path)
        with told(f"{path}: cannot load the adapter"):
            scorer = scorer_on_base(base, path, named, role, trainable)
        if scorer is not None:
            return scorer
    if isinstance(config, Model) and base is not None:  # model.adapter is on the policy's own
        config = replace(config, adapter=None)
    model, task = load_classifier(path, config, level_of(path))
    fit_embeddings(model, tokenizer, path)
    return _beside(adapt(model, path, config, task, device), base)


@fits
def scorer_from_policy(
    path: str,
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    level: str = RESPONSE,
    base: nn.Module | None = None,
) -> nn.Module:
    """The policy's trunk with a fresh scalar head in place of the unembedding.

    Args:
        base: the policy of that path, as it was loaded. Of an adapted one the scorer is one more
            adapter on the same base, with the weights of the policy's; frozen layers of a full one
            are shared.
    """
    if base is not None and is_adapted(base) and can_lend(base):
        head = nn.Linear(width_of(base), 1, bias=level != RESPONSE)
        init_head(head, seed)
        return critic_on_base(base, _free_name(base, CRITIC), head)
    model, task = load_classifier(path, config, level, fresh=True)
    init_head(scalar_head(model), seed)
    model.config.problem_type = SCORING
    added = fit_embeddings(model, tokenizer, path)
    if added is not None and base is None and adapter_base(path) is None:  # of a policy it is told
        say(added)
    return _beside(adapt(model, path, config, task, device), base)


def scorer_to_train(
    path: str,
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    level: str,
) -> tuple[nn.Module, list[str]]:
    """What a reward model starts from: another one with its head (preference model pretraining,
    2112.00861 sec. 4), or a policy's trunk with a fresh one.

    Returns:
        the model, and a line where it is another reward model.

    Raises:
        UserError: a reward model judges something else than `level`.
    """
    if kind_of(folder_of(path)) != "reward":
        return scorer_from_policy(path, config, tokenizer, seed, device, level), []
    check_level(path, level)
    return load_scorer(path, config, tokenizer, device), [f"{path} goes on, with its head"]


def load_critic(
    reward_path: str | None,
    policy_path: str,
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    base: nn.Module,
) -> nn.Module:
    """The network of a separate critic: a copy of a reward model, or the policy's trunk.

    Args:
        reward_path: a reward model of whole responses; null starts from the policy, and all values
            at 0, since those of a random head would be noise.
        base: the policy, which the critic shares weights with where that is possible.
    """
    if reward_path is not None:
        return load_scorer(reward_path, config, tokenizer, device, base)
    critic = scorer_from_policy(policy_path, config, tokenizer, seed, device, base=base)
    with torch.no_grad():
        for weight in scalar_head(unwrap(critic)).parameters():
            weight.zero_()
    return critic


def _free_name(adapted: Any, role: str) -> str:
    """The role, numbered where the base bears an adapter of that name."""
    names = (role, *(f"{role}{i}" for i in range(2, len(adapted.peft_config) + 2)))
    return next(name for name in names if name not in adapted.peft_config)


def _has_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has an embedding for each token."""
    return len(tokenizer) <= embedding_rows(model)


def _beside(model: nn.Module, policy: nn.Module | None) -> nn.Module:
    """A full model beside a full policy, whose frozen layers it shares, if they are not sharded."""
    if policy is not None and not is_adapted(policy) and not is_in_parts(policy):
        share_frozen(model, policy)
    return model
