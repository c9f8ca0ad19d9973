"""Responses by graphs of a step, by the step itself and by the plain decoder: the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.data.kinds import Prompt
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout import native, slot_sampler
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from tests.toys import DEVICE, bpe, data_of, hardware_of, llama, model_of

pytestmark = pytest.mark.gpu
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cut": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.2, "min_tokens": 10},
}
SAMPLES, LONGEST = 4, 64
ALIKE = 0.97  # a draw within rounding of the border between two tokens may fall on its other side


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with heads that the flash kernels take."""
    place = tmp_path_factory.mktemp("policy")
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    llama(300, **size, max_position_embeddings=512, initializer_range=0.08).save_pretrained(place)
    bpe().save_pretrained(place)
    return place


def engine_of(folder: Path, dtype: str, compiles: bool = False) -> tuple[NativeEngine, Encoder]:
    model = load_policy(str(folder), model_of(dtype=dtype, lora_rank=0), bpe(), DEVICE)
    encoder = Encoder(bpe(), data_of(max_prompt_tokens=96, max_response_tokens=LONGEST))
    hardware = hardware_of(rollout_tokens=40 * 160)
    return NativeEngine(model, encoder, hardware, compiles), encoder


def sampled(engine: NativeEngine, encoder: Encoder, way: str) -> list[Rollout]:
    """Responses to prompts of many lengths, more than there are slots for at once."""
    prompts = encoder.prompts([Prompt("the cat sat on " * (i % 5) + str(i)) for i in range(24)])
    sampling = Sampling(LONGEST, **WAYS[way])
    return engine.sample(prompts, sampling, samples=SAMPLES, seed=5)


def alike(ours: list[Rollout], theirs: list[Rollout], near: float) -> None:
    """Nearly all responses have the same tokens, and these the same log-probs."""
    pairs = list(zip(ours, theirs, strict=True))
    same = [(a, b) for a, b in pairs if a.tokens.response == b.tokens.response]
    assert len(same) >= ALIKE * len(pairs)
    for a, b in same:
        assert a.logprobs == pytest.approx(b.logprobs, rel=0, abs=near)


@pytest.mark.parametrize("way", WAYS)
def test_in_float32_graphs_slots_and_the_plain_decoder(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # slots end with the last token that they can hold, while steps go on until somebody looks
    monkeypatch.setattr(slot_sampler, "SIZES", range(1, 1000))
    engine, encoder = engine_of(folder, "float32")
    by_graphs = sampled(engine, encoder, way)
    assert "graph" not in capsys.readouterr().err  # nothing was said of doing without
    assert engine._slots._kept is not None and engine._slots._graphs
    by_steps, encoder = engine_of(folder, "float32")
    by_steps._slots._graphs = False
    alike(by_graphs, sampled(by_steps, encoder, way), 1e-4)
    monkeypatch.setattr(native, "fits_slots", lambda model, reach: False)
    plain, encoder = engine_of(folder, "float32")
    alike(by_graphs, sampled(plain, encoder, way), 1e-4)


@pytest.mark.parametrize("way", ["plain", "penalised"])
def test_in_bfloat16_a_graph_does_what_a_step_does(way: str, folder: Path) -> None:
    engine, encoder = engine_of(folder, "bfloat16")
    first = sampled(engine, encoder, way)
    alike(first, sampled(engine, encoder, way), 0.0)  # the graphs of before are replayed
    by_steps, encoder = engine_of(folder, "bfloat16")
    by_steps._slots._graphs = False
    alike(first, sampled(by_steps, encoder, way), 1e-3)


def test_compiled_pieces_draw_by_the_same_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They round otherwise, so that draws part in time; log-probs are those of a pass."""
    engine, encoder = engine_of(folder, "bfloat16", compiles=True)
    found = sampled(engine, encoder, "plain")
    assert engine._slots._compiles and "compiled" not in capsys.readouterr().err  # nothing failed
    scored = logprobs_of(engine._model, [each.tokens for each in found], hardware_of())
    pairs = zip(found, scored, strict=True)
    apart = torch.cat([torch.tensor(a.logprobs) - b for a, b in pairs]).abs()
    assert apart.mean() < 0.02 and apart.max() < 0.5


def test_graphs_follow_weights_that_are_changed_in_place(folder: Path) -> None:
    """As an optimizer changes them; their log-probs are those of the weights that there are."""
    engine, encoder = engine_of(folder, "bfloat16")
    before = sampled(engine, encoder, "plain")
    graphs = engine._slots._kept
    with torch.no_grad():
        for weight in engine._model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    after = sampled(engine, encoder, "plain")
    assert engine._slots._kept is graphs
    same = sum(a.tokens.response == b.tokens.response for a, b in zip(before, after, strict=True))
    assert same < 0.5 * len(after)
    scored = logprobs_of(engine._model, [each.tokens for each in after], hardware_of())
    pairs = zip(after, scored, strict=True)
    apart = torch.cat([torch.tensor(a.logprobs) - b for a, b in pairs]).abs()
    assert apart.mean() < 0.02 and apart.max() < 0.5
