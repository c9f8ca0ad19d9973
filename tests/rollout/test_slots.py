"""Slots draw what the plain decoder draws: whatever the family, the slots, the looks at them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.models import out_of_memory
from rlhf_cli.models.row_attention import laid_out
from rlhf_cli.rollout import native, slot_run
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.graphs import GraphDiffers, addresses, check_alike, check_near
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.pieces import Pieces
from rlhf_cli.rollout.prompt_slots import PromptTable
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.slot_probe import fits_slots, table_for
from rlhf_cli.rollout.slot_run import Ends, Job, SlotRun
from rlhf_cli.rollout.slot_sampler import SlotSampler
from rlhf_cli.rollout.slots import SlotCache, SlotTable
from rlhf_cli.runs.policy import compiles_sampling
from tests.model_families import names
from tests.rollout.test_feeding import MORE, loaded, prompts_of, stops_of
from tests.toys import composed, hardware_of, llama

FAST = ("gpt2", "gemma2", "gpt_oss", "deepseek_v3")  # in the fast tests
PLAIN = {  # what is not sampled in slots: attention or states of their own
    *("gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon", "xglm", "mamba", "falcon_mamba"),
    *("mamba2", "qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "jamba", "bamba", "zamba2"),
    *("nemotron_h", "granitemoehybrid", "recurrent_gemma", "qwen3_5", *MORE),
}
TOKENS, SAMPLES = 9, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "filters": {"temperature": 0.7, "top_k": 30, "top_p": 0.9},
    "rules": {"repetition_penalty": 1.4, "min_tokens": 4, "absent": (5, 6)},
}


def noise_of(rows: int) -> torch.Tensor:
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(2))


def jobs_of(prompts: Sequence[list[int]], noise: torch.Tensor) -> list[Job]:
    samples = len(noise) // len(prompts)
    return [Job(prompts[i // samples], lambda i=i: noise[i]) for i in range(len(noise))]  # type: ignore[misc]


@torch.no_grad()
def in_slots(
    model: Any,
    prompts: list[list[int]],
    noise: torch.Tensor,
    sampling: Sampling,
    slots: int,
    every: int,
    kind: type[SlotTable] = SlotTable,
) -> list[Completion]:
    """Drawn in so many slots that are looked at every so many steps."""
    capacity = max(map(len, prompts)) + sampling.max_tokens
    table = kind(model, sampling, stops_of(model), slots, capacity)
    ends = Ends(stops_of(model), sampling.stop, lambda ids: " ".join(map(str, ids)))
    run = SlotRun(model, table, slots, ends, table.step, every)
    found = dict(pair for part in run.completions(jobs_of(prompts, noise)) for pair in part)
    return [found[place] for place in range(len(noise))]


def by_decoder(
    model: Any, prompts: list[list[int]], noise: torch.Tensor, sampling: Sampling
) -> list[Completion]:
    text_of: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids))  # noqa: E731
    return decode(model, prompts, noise, sampling, stops_of(model), text_of)


def same(ours: list[Completion], theirs: list[Completion], rounding: float = 1e-5) -> None:
    assert [(each.ids, each.finish_reason) for each in ours] == [
        (each.ids, each.finish_reason) for each in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=rounding, rel=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in (*names(), *MORE)
    ],
)
def test_a_family_draws_the_same_or_is_left_to_the_decoder(family: str, tmp_path: Path) -> None:
    """Prompts and responses reach beyond its windows; 15 responses in 5 slots."""
    model = loaded(family, tmp_path)
    fits = fits_slots(model, 30)
    assert fits == (family not in PLAIN)
    if fits:
        prompts, noise = prompts_of(model), noise_of(5 * SAMPLES)
        expected = by_decoder(model, prompts, noise, Sampling(TOKENS))
        assert len({len(each.ids) for each in expected}) > 2
        own = table_for(model)
        for slots, every, kind in ((5, 1, own), (7, 4, SlotTable), (15, 1, own)):
            ours = in_slots(model, prompts, noise, Sampling(TOKENS), slots, every, kind)
            same(ours, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("slots", "every", "kind"), [(1, 1, PromptTable), (4, 3, SlotTable), (4, 3, PromptTable)]
)
def test_options_draw_the_same(
    options: dict[str, Any], slots: int, every: int, kind: type[SlotTable]
) -> None:
    model = llama(90)
    prompts = [[7, 30, 31], [8], [9, 40, 41, 42, 43, 44, 45]]
    sampling = Sampling(TOKENS, **options)
    noise = noise_of(6)
    expected = by_decoder(model, prompts, noise, sampling)
    same(in_slots(model, prompts, noise, sampling, slots, every, kind), expected)


@pytest.mark.parametrize("every", [1, 4])
def test_a_stop_string_ends_where_it_comes_up(every: int) -> None:
    """However many tokens were drawn before anybody looked."""
    model = llama(90)
    prompts, noise = [[7, 31], [8, 33, 34]], noise_of(8)
    free = by_decoder(model, prompts, noise, Sampling(TOKENS))
    strings = tuple(str(each.ids[len(each.ids) // 2]) for each in free[:3])
    sampling = Sampling(TOKENS, stop=strings)
    expected = by_decoder(model, prompts, noise, sampling)
    assert {each.finish_reason for each in expected} >= {"stop"} and expected != free
    same(in_slots(model, prompts, noise, sampling, 3, every), expected)


def test_an_adapter_draws_the_same_unmerged() -> None:
    base = llama(90)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    prompts, noise = [[7, 30, 31], [8]], noise_of(4)
    expected = by_decoder(model, prompts, noise, Sampling(TOKENS))
    same(in_slots(model, prompts, noise, Sampling(TOKENS), 3, 1), expected)
    with model.disable_adapter():
        assert expected != by_decoder(model, prompts, noise, Sampling(TOKENS))


def engine_of(model: Any, **hardware: Any) -> NativeEngine:
    known = {str(id): id for id in range(90)}
    encoder: Any = SimpleNamespace(
        stop_ids=stops_of(model),
        text=str,
        tokenizer=SimpleNamespace(get_vocab=lambda: known),
    )
    return NativeEngine(model, encoder, hardware_of(**hardware))


def rollouts(model: Any, sampling: Sampling, samples: int = 3, **hardware: Any) -> list[Rollout]:
    prompts = [(Prompt("p"), ids) for ids in ([7, 30, 31], [8], [9, *range(40, 70)], [11, 12])]
    return engine_of(model, **hardware).sample(prompts, sampling, samples=samples, seed=3)


def test_engines_agree_on_any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts and short ones, which are not in slots of one size; a model that trains."""
    model = llama(90)
    model.gradient_checkpointing_enable()
    model.train()
    found = [rollouts(model, Sampling(TOKENS, 0.8), rollout_tokens=n) for n in (1, 60, 9999)]
    assert model.training and all(module.training for module in model.modules())
    monkeypatch.setattr(native, "fits_slots", lambda model, reach: False)
    plain = rollouts(model, Sampling(TOKENS, 0.8), rollout_tokens=9999)
    for each in found:
        assert [one.tokens for one in each] == [one.tokens for one in plain]
        for one, other in zip(each, plain, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_wrong_way_is_found_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys that are written a place too early, as by a cache that counts from 0."""
    append = SlotCache.to_append
    model = llama(90)
    expected = rollouts(model, Sampling(TOKENS))
    wrong = llama(90)
    monkeypatch.setattr(
        SlotCache, "to_append", lambda self, places: append(self, (places - 1).clamp(min=0))
    )
    found = rollouts(wrong, Sampling(TOKENS))
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert rollouts(wrong, Sampling(TOKENS))
    assert capsys.readouterr().err.count("LlamaForCausalLM is not sampled in slots") == 1


def test_what_fails_on_the_way_goes_on_by_the_decoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a kernel refuses a size: what is drawn stays, the rest follows."""
    model = llama(90)
    expected = rollouts(model, Sampling(TOKENS), rollout_tokens=60)
    step, left = SlotTable.step, 14

    def failing(self: SlotTable, rows: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise NotImplementedError("no kernel for this size")
        step(self, rows)

    monkeypatch.setattr(SlotTable, "step", failing)
    found = rollouts(model, Sampling(TOKENS), rollout_tokens=60)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert capsys.readouterr().err.count("is not sampled in slots") == 1


def test_a_step_asks_nothing_of_the_device() -> None:
    """Under fake tensors whatever needs a value fails: what a graph could not hold."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = llama(90)
        sampling = Sampling(TOKENS, 0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
        sampling.min_tokens, sampling.absent = 2, (5,)
        table = SlotTable(model, sampling, stops_of(model), 4, 20)
        with laid_out(model, table.layout(3)):
            table.step(3)
        assert table.tokens.fake_mode is mode  # type: ignore[attr-defined]


@pytest.mark.parametrize("most", [None, 13])
def test_rows_of_a_graph_are_few(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: powers of two, each as many as are needed, looked at every few steps."""
    model = llama(90)
    prompts, noise = [[7, 30, 31], [8], [9, 40]], noise_of(33)
    sampling = Sampling(TOKENS)
    expected = by_decoder(model, prompts, noise, sampling)
    monkeypatch.setattr(slot_run, "LEAST", 2)
    table = SlotTable(model, sampling, stops_of(model), 16, 12)
    taken: list[int] = []

    def step(rows: int) -> None:
        taken.append(rows)
        table.step(rows)

    run = SlotRun(model, table, 13, Ends(stops_of(model), (), str), step, 4, most)
    run._on_gpu = True
    with torch.no_grad():
        found = dict(pair for part in run.completions(jobs_of(prompts, noise)) for pair in part)
    same([found[place] for place in range(33)], expected)
    first = most or 16
    assert set(taken) <= {2, 4, 8, first} and taken[0] == first
    assert taken == sorted(taken, reverse=True)


def test_long_runs_compile_what_they_sample_with() -> None:
    words = ("algo.steps=100", "algo.max_tokens=100")
    assert compiles_sampling(composed("grpo", *words, "algo.batch_size=64", "algo.group_size=8"))
    assert not compiles_sampling(composed("ppo", *words, "algo.batch_size=64"))
    assert compiles_sampling(composed("ppo", *words, "hardware.compile=true"))
    assert not compiles_sampling(composed("sft", "hardware.compile=auto"))


def test_a_graph_that_differs_is_refused() -> None:
    plain = {
        "ended": torch.tensor([False, True]),
        "drawn": torch.tensor([1, 3]),
        "tokens": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "logprobs": torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
    }
    check_alike(plain, plain, plain)
    idle = {**plain, "tokens": torch.tensor([[4, 5, 0], [6, 7, 9]])}
    check_alike(plain, plain, idle)  # nobody reads what an ended slot draws
    other = {**plain, "logprobs": torch.zeros(2, 3)}
    with pytest.raises(GraphDiffers):
        check_alike(plain, plain, other)
    many = {name: each[:1].expand(20, *each.shape[1:]).clone() for name, each in plain.items()}
    others = {**many, "tokens": many["tokens"].clone()}
    others["tokens"][:2] += 1  # as rounding does to one in ten
    check_alike(many, many, others)
    others["tokens"][:3] += 1
    with pytest.raises(GraphDiffers):
        check_alike(many, many, others)


def test_states_of_another_step_are_told_from_rounded_ones() -> None:
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    check_near(states, states.bfloat16())
    for other in (states.flip(0), 1.2 * states, torch.full_like(states, torch.nan)):
        with pytest.raises(GraphDiffers):
            check_near(states, other)


def test_pieces_stand_in_for_parts_within_a_block_alone() -> None:
    model = llama(90)
    calls: list[str] = []

    def noted(graph: Any, inputs: Any) -> Any:
        calls.append("piece")
        return graph.forward

    pieces = Pieces(model, backend=noted)
    assert len(pieces) == 1 + 2 + 5  # the rotation, MLPs, norms
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        before = modeling_llama.apply_rotary_pos_emb
        with pieces:
            found = model(ids).logits
            assert len(set(calls)) == 1 and modeling_llama.apply_rotary_pos_emb is not before
        made = len(calls)
        assert torch.equal(model(ids).logits, expected) and len(calls) == made
    torch.testing.assert_close(found, expected)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())
    adapted: Any = get_peft_model(llama(90), LoraConfig(r=2, target_modules="all-linear"))
    assert len(Pieces(adapted)) == 1 + 5


def test_graphs_are_made_anew_where_what_they_hold_has_moved() -> None:
    model = llama(90)
    before = addresses(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert addresses(model) == before
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert addresses(model) != before
    adapted: Any = get_peft_model(llama(90), LoraConfig(r=2, target_modules="all-linear"))
    on = addresses(adapted)
    with adapted.disable_adapter():
        assert addresses(adapted) != on
    assert addresses(adapted) == on


def no_memory(group: list[int]) -> RunError:
    raise AssertionError(group)


def test_kept_slots_make_way_for_other_work() -> None:
    sampler = SlotSampler([2], str)
    sampler._kept = kept = object()  # type: ignore[assignment]
    left = 1

    def work() -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise MemoryError
        return "done"

    assert out_of_memory.if_it_fits(work) is None  # what may not be done twice is not
    assert sampler._kept is None and kept is not None
    sampler._kept, left = kept, 1  # type: ignore[assignment]
    assert list(out_of_memory.in_groups([[1]], lambda group: work(), no_memory)) == [([1], "done")]
    assert not sampler.release()


def test_what_a_graph_holds_stays_where_steps_go_on_beyond_the_last_token() -> None:
    """As a GPU's do until somebody looks: its slots have all the room that there is."""
    cache = SlotCache(2, 8)
    cache.to_append(torch.zeros(2, dtype=torch.long))
    kept = cache.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0)
    before = [each.data_ptr() for each in kept]
    for tokens in (8, 9, 27):
        cache.grow(tokens, 8)
        assert [each.data_ptr() for each in cache.kept[0]] == before
