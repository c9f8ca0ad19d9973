"""Whatever a family keeps of what it has read: sampled as transformers does, scored as in training.

Keys and values, windows, recurrent and convolutional states, under several names and in several
places, with left padding where that leaves no trace.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import LlamaForCausalLM

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.items import Tokens
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.models.decoder import embedding_rows
from rlhf_cli.models.layouts import found_layout
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.rollout.beam import beam_search
from rlhf_cli.rollout.decode import Completion, decode
from rlhf_cli.rollout.feeding import reorders, way_of
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.sampling import Sampling
from tests.model_families import build, names
from tests.pace import fast
from tests.toys import FROZEN, hardware_of, llama

DEFAULT = ("mamba", "recurrent_gemma")  # in the fast tests
LENGTHS = (3, 1, 14, 5, 1)  # of prompts; windows are of 8 tokens
TOKENS, SAMPLES = 9, 3
ENDS = 10  # one id in so many ends a response

SIZE: dict[str, Any] = {
    "vocab_size": 90,
    "pad_token_id": 0,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
# states that no family of tests/model_families.py has: a list of tensors in a decoder that mixes up
# the rows of a batch, a dictionary of tuples, a list beside keys and values where pads count
MORE: dict[str, Any] = {
    "rwkv": lambda: hf.RwkvConfig(**SIZE, attention_hidden_size=64, intermediate_size=96),
    "xlstm": lambda: hf.xLSTMConfig(
        **{**SIZE, "hidden_size": 128}, embedding_dim=128, num_blocks=2, num_heads=4, chunk_size=16
    ),
    "minimax": lambda: hf.MiniMaxConfig(
        **SIZE, **HEADS, **MIXED, intermediate_size=32, num_local_experts=4, block_size=4
    ),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(
        **SIZE,
        **HEADS,
        **MIXED,
        intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}


def loaded(family: str, folder: Path) -> Any:
    """A family's tiny model, as a stage loads it where it is one of the table."""
    if family in MORE:
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(MORE[family]()).eval()
    build(family, folder)
    tokenizer = load_tokenizer(str(folder), FROZEN)
    return load_policy(str(folder), FROZEN, tokenizer, torch.device("cpu"))


def prompts_of(model: Any) -> list[list[int]]:
    size = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(20, size, (length,), generator=draw).tolist() for length in LENGTHS]


def stops_of(model: Any) -> list[int]:
    return list(range(0, model.get_input_embeddings().num_embeddings, ENDS))


def noise_of(rows: int) -> torch.Tensor:
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(2))


def sampled(model: Any, prompts: list[list[int]], noise: torch.Tensor) -> list[Completion]:
    return decode(model, prompts, noise, Sampling(TOKENS), stops_of(model), str)


def theirs(model: Any, prompt: list[int], **more: Any) -> list[int]:
    """What transformers generates on a copy that has read nothing yet."""
    stops = stops_of(model)
    row: list[int] = (
        copy.deepcopy(model)
        .generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=stops,
            pad_token_id=stops[0],
            **more,
        )[0, len(prompt) :]
        .tolist()
    )
    end = next((i + 1 for i, id in enumerate(row) if id in stops), None)
    return row[:end]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow])
        for name in (*names(), *MORE)
    ],
)
def test_a_family_is_sampled_as_it_is_and_as_it_is_scored(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path)
    fresh = copy.deepcopy(model)
    prompts, noise = prompts_of(model), noise_of(len(LENGTHS) * SAMPLES)
    found = sampled(model, prompts, noise)
    assert len({len(each.ids) for each in found}) > 2  # rows leave the batch at different steps

    apart = noise.split(SAMPLES)
    alone = [sampled(model, [ids], own) for ids, own in zip(prompts, apart, strict=True)]
    assert [each.ids for each in found] == [each.ids for part in alone for each in part]

    sequences = [Tokens(prompts[i // SAMPLES], each.ids) for i, each in enumerate(found)]
    scored = logprobs_of(model, sequences, hardware_of())
    rounding = 1e-5 if way_of(model).exact else 1e-2
    for each, values in zip(found, scored, strict=True):
        assert each.logprobs == pytest.approx(values.tolist(), abs=rounding)

    greedy = Sampling(TOKENS, temperature=0)
    ours = decode(model, prompts, noise[: len(prompts)], greedy, stops_of(model), str)
    assert [each.ids for each in ours] == [theirs(fresh, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "family",
    fast(["recurrent_gemma"], ["recurrent_gemma", "mamba", *MORE]),
)
def test_beams_keep_their_own_states(family: str, tmp_path: Path) -> None:
    """A search that reads every hypothesis anew finds the same."""
    model = loaded(family, tmp_path)
    fresh = copy.deepcopy(model)
    prompt = prompts_of(model)[2]
    sampled(model, [prompt], noise_of(4))  # leaves a state behind where modules hold it
    search = Sampling(TOKENS, beams=4)
    (found,) = beam_search(model, prompt, search, 1, stops_of(model), 64)
    assert found.ids == theirs(fresh, prompt, num_beams=4, use_cache=False)


def test_ways(tmp_path: Path) -> None:
    """What is found out is what the families do, by the reading of their code."""
    mamba = way_of(loaded("mamba", tmp_path / "mamba"))
    assert (mamba.argument, mamba.masked, mamba.padded, mamba.held) == (
        *("cache_params", False, True),
        (),
    )
    griffin = loaded("recurrent_gemma", tmp_path / "griffin")
    way = way_of(griffin)
    assert way.argument == "past_key_values" and not way.padded  # its convolution sees pads
    assert {each.rpartition(".")[2] for each in way.held} == {"conv1d_state", "recurrent_states"}
    assert not reorders(griffin) and not found_layout(griffin)[0].packed
    rwkv = loaded("rwkv", tmp_path)
    assert way_of(rwkv).alone and not reorders(rwkv) and not found_layout(rwkv)[0].packed
    plain = llama()
    assert way_of(plain).padded and reorders(plain)


def test_a_model_that_keeps_nothing_reads_everything_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Forgetful(LlamaForCausalLM):
        """Its decoder takes no state back."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            read = self.model.forward

            def forward(input_ids: Any, attention_mask: Any, position_ids: Any, **rest: Any) -> Any:
                return read(input_ids, attention_mask, position_ids, use_cache=False)

            self.model.forward = forward

    whole = llama()
    forgetful = Forgetful(whole.config).eval()
    forgetful.load_state_dict(whole.state_dict())
    prompts, noise = prompts_of(whole), noise_of(len(LENGTHS) * SAMPLES)
    found, expected = sampled(forgetful, prompts, noise), sampled(whole, prompts, noise)
    assert [each.ids for each in found] == [each.ids for each in expected]
    assert len({len(each.ids) for each in found}) > 3
    assert way_of(forgetful).argument is None and way_of(forgetful).padded
    assert capsys.readouterr().err.count("Forgetful keeps nothing that sampling could go on") == 1


def test_states_that_are_not_finite_are_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(RunError, match=r"its weight model\.norm\.weight is not"):
        sampled(model, [[1, 5]], noise_of(1))
    assert not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nemotron_h", "zamba2"])
def test_a_step_that_computes_otherwise_is_scored_as_training_does(
    family: str, tmp_path: Path
) -> None:
    """Their pass over a text bounds the step size below, their single step does not."""
    model = loaded(family, tmp_path)
    assert not way_of(model).exact
    known = {str(id): id for id in range(embedding_rows(model))}
    vocabulary = SimpleNamespace(get_vocab=lambda: known)
    encoder: Any = SimpleNamespace(stop_ids=stops_of(model), text=str, tokenizer=vocabulary)
    engine = NativeEngine(model, encoder, hardware_of())
    rows = [(Prompt("p"), ids) for ids in prompts_of(model)]
    found = engine.sample(rows, Sampling(TOKENS, 0.7), samples=SAMPLES, seed=0)
    scored = logprobs_of(model, [each.tokens for each in found], hardware_of(), 0.7)
    for each, values in zip(found, scored, strict=True):
        assert each.logprobs == pytest.approx(values.tolist(), abs=5e-6)
