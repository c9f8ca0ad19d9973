"""One working copy of the weights in bfloat16 and float32 masters behind it: nothing is lost."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.config.errors import RunError
from rlhf_cli.config.schema.models import Model
from rlhf_cli.data.batches import collate
from rlhf_cli.data.items import Tokens
from rlhf_cli.folders.manifest import RESPONSE
from rlhf_cli.models.adapters import POLICY, REFERENCE, restore, snapshot, trained, weights_of
from rlhf_cli.models.decoder import unwrap
from rlhf_cli.models.dtypes import round_trained
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.heads import scalar_head
from rlhf_cli.models.load import load_policy, load_weights
from rlhf_cli.models.masters import gather, give_masters, held_as, hold, master_of
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.save import save_model
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.scorers import load_critic, scorer_from_policy
from rlhf_cli.models.shared import SharedScorer
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.objectives.likelihood import nll_sum
from rlhf_cli.rollout.decode import decode
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.training.loss_term import Loss, LossTerm
from rlhf_cli.training.optimize import Optimizer
from tests.model_families import build, names
from tests.toys import FROZEN, bpe, composed, hardware_of, llama, model_of, sequences_of

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
TOKENIZER = bpe()
HALF = model_of(dtype="bfloat16")
LORA = replace(HALF, lora_rank=2, lora_alpha=8.0, merge_lora=False)
SEQUENCES = sequences_of(4)
COUNT = sum(len(each.response) for each in SEQUENCES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy in float32, none of whose weights is a number of bfloat16."""
    place = tmp_path_factory.mktemp("policy")
    save_model(llama(len(TOKENIZER)), TOKENIZER, place, merge=False)
    return str(place)


def policy_of(folder: str, config: Any = HALF) -> Any:
    torch.manual_seed(3)  # of fresh adapters
    return load_policy(folder, config, TOKENIZER, CPU)


def optimizer_of(model: nn.Module, **changes: Any) -> Optimizer:
    config = replace(
        composed("dpo").algo,
        **{"lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.5}
        | changes,
    )
    return Optimizer({"policy": (model, config.rate)}, config, 9, hardware_of())


def term_of(model: nn.Module, cut: int = 4, chunk: int = 99) -> LossTerm:
    """The loss of sft on a few sequences, `cut` in a micro-batch."""

    def loss(sequences: list[Tokens]) -> Loss:
        batch = collate(sequences)
        return nll_sum(token_logprobs(model, batch, chunk=chunk).logprobs, batch.response), {}

    batches = [SEQUENCES[i : i + cut] for i in range(0, len(SEQUENCES), cut)]
    return LossTerm(batches, loss, COUNT)


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {name: master_of(weight).detach() for name, weight in trained(model).items()}


def follows(model: nn.Module) -> bool:
    """Whether each working copy is its rounded master."""
    pairs = [(weight, master_of(weight)) for weight in trained(model).values()]
    return all(torch.equal(ours, master.to(ours.dtype)) for ours, master in pairs)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --------------------------------------------------------------------------- loaded, held


def test_a_checkpoint_of_float32_is_whole_in_the_masters(folder: str) -> None:
    half, exact = policy_of(folder), policy_of(folder, model_of(dtype="float32"))
    assert {weight.dtype for weight in half.parameters()} == {BF16}
    assert same(masters(half), dict(exact.named_parameters())) and follows(half)
    assert not any(hasattr(weight, "master") for weight in exact.parameters())
    frozen = policy_of(folder, replace(FROZEN, dtype="bfloat16"))  # as reference and reward are
    assert {weight.dtype for weight in frozen.parameters()} == {BF16}
    assert not any(hasattr(weight, "master") for weight in frozen.parameters())


def test_an_adapter_has_masters_and_its_base_none(folder: str) -> None:
    half, exact = policy_of(folder, LORA), policy_of(folder, replace(LORA, dtype="float32"))
    assert {weight.dtype for weight in half.parameters()} == {BF16}
    assert same(masters(half), dict(trained(exact)))
    with_masters = {name for name, each in half.named_parameters() if hasattr(each, "master")}
    assert with_masters == set(trained(half))


@pytest.mark.parametrize("config", [HALF, LORA], ids=["full", "lora"])
def test_scalar_heads_are_float32(config: Model, folder: str) -> None:
    scorer = scorer_from_policy(folder, config, TOKENIZER, 7, CPU, RESPONSE)
    kinds = {weight.dtype for weight in scalar_head(unwrap(scorer)).parameters()}
    assert kinds == {F32}
    critic = load_critic(None, folder, config, TOKENIZER, 5, CPU, policy_of(folder, config))
    assert isinstance(critic, SharedScorer) == bool(config.lora_rank)
    names = {name: weight.dtype for name, weight in critic.named_parameters()}
    assert {dtype for name, dtype in names.items() if "score" in name} == {F32}
    assert {dtype for name, dtype in names.items() if "score" not in name} == {BF16}
    assert follows(critic)


# --------------------------------------------------------------------------- steps


def test_masters_take_the_steps_of_float32_adamw(folder: str) -> None:
    """Three clipped steps: those of AdamW in float32 on the gradients that bfloat16 gave."""
    model = policy_of(folder)
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    weights = [nn.Parameter(each.clone()) for each in masters(model).values()]
    algo = composed("dpo").algo
    adamw = torch.optim.AdamW(
        weights,
        lr=1e-3,
        betas=(algo.adam_beta1, algo.adam_beta2),
        eps=algo.adam_eps,
        weight_decay=algo.weight_decay,
        fused=True,
    )
    addresses = [weight.data_ptr() for weight in model.parameters()]
    for _ in range(3):
        term = term_of(twin)
        loss, _ = term.loss(SEQUENCES)
        (loss / COUNT).backward()
        for weight, each in zip(weights, twin.parameters(), strict=True):
            weight.grad, each.grad = each.grad.float(), None
        norm = nn.utils.clip_grad_norm_(weights, 0.5)
        adamw.step()
        for weight, each in zip(weights, twin.parameters(), strict=True):
            each.data.copy_(weight.data)
        report = optimizer.step([term_of(model)])
        assert report["grad_norm/policy"] == norm.item() > 0.5
        assert all(map(torch.equal, masters(model).values(), weights)) and follows(model)
    assert [weight.data_ptr() for weight in model.parameters()] == addresses


def test_steps_too_small_for_bfloat16_add_up() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    hold(dict(layer.named_parameters()), trained=True)
    optimizer = optimizer_of(layer, lr=1e-3, weight_decay=0.0)
    for step in range(4):
        assert layer.weight.item() == (1.0 if step < 2 else 1 - 2**-8)  # 0.998 rounds to 0.996
        term = LossTerm([torch.ones(1, 1)], lambda batch: (layer(batch.to(BF16)).sum(), {}), 1)
        optimizer.step([term])
    assert master_of(layer.weight).item() == pytest.approx(0.996, abs=1e-5)


def test_gradients_of_micro_batches_are_summed_in_float32(folder: str) -> None:
    whole, parts = policy_of(folder), policy_of(folder)
    optimizer_of(whole).step([term_of(whole)])
    optimizer_of(parts).step([term_of(parts, cut=1)])
    expected: dict[str, Tensor] = {name: torch.zeros_like(w) for name, w in masters(whole).items()}
    for one in SEQUENCES:
        alone = policy_of(folder)
        (term_of(alone).loss([one])[0] / COUNT).backward()
        for name, weight in trained(alone).items():
            assert weight.grad is not None
            expected[name] += weight.grad
    apart = {}
    for name, weight in trained(parts).items():
        found = master_of(weight).grad
        assert found is not None and found.dtype == F32 and weight.grad is None
        apart[name] = (found / found.norm(), expected[name] / expected[name].norm())
        ours = master_of(trained(whole)[name]).grad
        assert ours is not None and (found - ours).norm() < 0.02 * ours.norm()
    for ours, theirs in apart.values():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_chunks_of_logits_are_summed_in_float32(folder: str) -> None:
    """As many chunks as tokens leave no more of rounding in the unembedding than one does."""
    exact = policy_of(folder, model_of(dtype="float32"))
    term_of(exact).loss(SEQUENCES)[0].backward()
    errors = []
    for chunk in (99, 1):
        model = policy_of(folder)
        term_of(model, chunk=chunk).loss(SEQUENCES)[0].backward()
        gather(model.parameters())
        gradient = master_of(model.lm_head.weight).grad
        assert gradient is not None
        errors.append((gradient - exact.lm_head.weight.grad).norm().item())
    assert errors[1] < 1.2 * errors[0]


def test_what_was_frozen_can_learn_later(folder: str) -> None:
    """As a reward model that grpo refreshes does, twice, with an optimizer of its own each time."""
    model = policy_of(folder, replace(FROZEN, dtype="bfloat16")).requires_grad_(False)
    give_masters(model.parameters())
    before = snapshot(model.requires_grad_(True))
    for _ in range(2):
        model.requires_grad_(True)
        optimizer_of(model).step([term_of(model)])
        model.requires_grad_(False)
    model.requires_grad_(True)
    assert follows(model) and not same(masters(model), before)


def test_a_bad_gradient_is_named_and_leaves_nothing(folder: str) -> None:
    model = policy_of(folder)
    before = {name: value.clone() for name, value in masters(model).items()}

    def loss(batch: list[Tokens]) -> Loss:
        weight = model.model.norm.weight
        return term_of(model).loss(batch)[0] + (weight - weight).sqrt().sum(), {}

    optimizer = optimizer_of(model, max_skipped=1)
    with pytest.raises(RunError, match=r"gradient of policy: model\.norm\.weight"):
        optimizer.step([LossTerm([SEQUENCES], loss, COUNT)])
    weights = list(trained(model).values())
    assert not any(weight.grad is not None for weight in [*weights, *map(master_of, weights)])
    assert same(masters(model), before) and follows(model)


# --------------------------------------------------------------------------- written


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_what_is_written_are_the_masters(dtype: torch.dtype, folder: str, tmp_path: Path) -> None:
    model = policy_of(folder)
    optimizer_of(model).step([term_of(model)])
    before = masters(model)
    round_trained(model, dtype)
    assert follows(model)
    save_model(model, TOKENIZER, tmp_path, merge=False, dtype=dtype)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name].to(dtype)) for name, value in written.items())
    assert {weight.dtype for weight in model.parameters()} == {BF16} and follows(model)
    again = policy_of(str(tmp_path))  # computes the same as what was measured
    assert same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_frozen_layers_are_written_as_they_came(folder: str, tmp_path: Path) -> None:
    model = policy_of(folder, replace(HALF, frozen_layers=1))
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen
    save_model(model, TOKENIZER, tmp_path, merge=False)
    first, written = (load_file(Path(each) / "model.safetensors") for each in (folder, tmp_path))
    assert all(torch.equal(written[name], first[name]) for name in frozen)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_written_from_its_masters(merge: bool, folder: str, tmp_path: Path) -> None:
    """As one in float32 that has the same masters."""
    config = replace(LORA, merge_lora=merge)
    half, exact = policy_of(folder, config), policy_of(folder, replace(config, dtype="float32"))
    optimizer_of(half, lr=0.1).step([term_of(half)])
    restore(exact, masters(half))
    written = []
    for name, model in {"half": half, "exact": exact}.items():
        save_model(model, TOKENIZER, tmp_path / name, merge)
        (file,) = (tmp_path / name).glob("*.safetensors")
        written.append(load_file(file))
    assert same(*written) and {value.dtype for value in written[0].values()} == {F32}
    assert {weight.dtype for weight in half.parameters()} == {BF16} and follows(half)


@pytest.mark.parametrize("config", [HALF, LORA], ids=["full", "lora"])
def test_a_folder_goes_back_into_the_masters(config: Model, folder: str, tmp_path: Path) -> None:
    """As reference=bootstrap loads what it wrote before."""
    model = policy_of(folder, config)
    optimizer_of(model, lr=0.1).step([term_of(model)])
    save_model(model, TOKENIZER, tmp_path, merge=False)
    again = policy_of(folder, config)
    load_weights(again, str(tmp_path), config)
    assert same(masters(again), masters(model)) and follows(again)


def test_an_unchanged_block_of_another_type_changes_nothing(folder: str) -> None:
    model = policy_of(folder)
    before, addresses = masters(model), [each.data_ptr() for each in model.parameters()]
    before = {name: value.clone() for name, value in before.items()}
    with held_as(F32, model.parameters()):
        assert {weight.dtype for weight in model.parameters()} == {F32}
    with held_as(torch.float16, model.parameters(), lasting=False):
        assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert same(masters(model), before) and follows(model)
    assert [each.data_ptr() for each in model.parameters()] == addresses


# --------------------------------------------------------------------------- reference, resume


@pytest.mark.parametrize("config", [HALF, LORA], ids=["full", "lora"])
def test_a_reference_computes_what_the_policy_did(config: Model, folder: str) -> None:
    policy = policy_of(folder, config)

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return token_logprobs(model, collate(SEQUENCES), chunk=99).logprobs

    reference = Reference(policy)
    first = outputs(policy)
    optimizer_of(policy, lr=0.1).step([term_of(policy)])
    with reference.active() as model:
        assert torch.equal(outputs(model), first) and reference.digest() == reference.hash
    reference.refresh()
    with reference.active() as model:
        assert torch.equal(outputs(model), outputs(policy)) and reference.digest() == reference.hash
    assert not torch.equal(outputs(policy), first)
    if config.lora_rank:
        own = weights_of(policy, REFERENCE)
        assert {weight.dtype for weight in own.values()} == {BF16}
        assert not any(hasattr(weight, "master") for weight in own.values())
        assert own.keys() == weights_of(policy, POLICY).keys()


@pytest.mark.parametrize("config", [HALF, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_the_same_to_the_bit(config: Model, folder: str) -> None:
    whole = policy_of(folder, config)
    optimizer = optimizer_of(whole)
    for _ in range(2):
        optimizer.step([term_of(whole, cut=1)])
    kept = snapshot(whole), {k: v.clone() for k, v in optimizer.tensors().items()}
    state = optimizer.state()
    again = policy_of(folder, config)
    resumed = optimizer_of(again)
    restore(again, kept[0])
    resumed.load(kept[1], state)
    assert follows(again)
    for each, model in ((optimizer, whole), (resumed, again)):
        each.step([term_of(model, cut=1)])
    assert same(masters(again), masters(whole)) and same(resumed.tensors(), optimizer.tensors())


# --------------------------------------------------------------------------- families


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
def test_a_family_trains_in_bfloat16(family: str, tmp_path: Path) -> None:
    """Log-probs near those of float32 and of sampling, and a step that changes the same weights."""
    build(family, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), FROZEN)
    found: list[Tensor] = []
    moved: list[set[str]] = []
    for dtype in ("float32", "bfloat16"):
        model = load_policy(str(tmp_path), model_of(dtype=dtype), tokenizer, CPU)
        with torch.no_grad():
            found.append(token_logprobs(model, collate(SEQUENCES), chunk=99).logprobs)
        before = snapshot(model)
        optimizer_of(model).step([term_of(model)])
        after = masters(model)
        moved.append({name for name in after if not torch.equal(after[name], before[name])})
        assert follows(model)
        noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
        drawn = decode(model, [[5, 9, 30], [7]], noise, Sampling(6), [1], lambda ids: "")
        rows = [Tokens(ids, each.ids) for ids, each in zip([[5, 9, 30], [7]], drawn, strict=True)]
        scored = logprobs_of(model, rows, hardware_of())
        sampled = torch.tensor([value for each in drawn for value in each.logprobs])
        assert (torch.cat(scored) - sampled).abs().mean() < 0.03
    mean = (found[0] - found[1]).abs().mean().item()
    assert mean < (0.2 if "moe" in family or "deepseek" in family else 0.1)  # routers may turn
    assert moved[0] == moved[1]
