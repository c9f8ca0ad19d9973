"""benchmarks/scale.py: its formulas are those of --check, and its page has the tables it prints."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.compose import compose
from rlhf_cli.runs.memory_estimate import parts_of
from rlhf_cli.runs.sharing import Ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale")


def test_the_page_has_the_tables_that_are_printed(scale: Any) -> None:
    assert "\n".join(scale.arithmetic()) in (BENCHMARKS / "scale.md").read_text()


@pytest.mark.parametrize("shard", ["none", "hybrid", "full"])
def test_bytes_of_a_rank_are_those_of_the_check(shard: str, scale: Any) -> None:
    """Of a model whose unembedding is its embedding, which the formulas count twice."""
    sizes = {"hidden_size": 768, "layers": 6, "heads": 6, "vocab_size": 5000, "context": 4096}
    words = [f"model.{name}={size}" for name, size in sizes.items()]
    words += ["algo.batch_size=64", "data.max_prompt_tokens=512", "data.max_response_tokens=512"]
    cfg = compose("sft", [*words, "algo.keep=last", "hardware.tokens_per_microbatch=1024"])
    always, update, _ = parts_of(cfg, width=2, ranks=Ranks(16, 8), shard=shard)
    model = scale.Model("toy", 6, 768, 768, 768 * 8 // 3, 2500)  # half of the table, twice
    cluster, step = scale.Cluster(2, 8), scale.Step(4096, 4, False)
    found = scale.held(model, shard, cluster, step)
    weights = always["weights of the policy"] + always.get("float32 masters of what is trained", 0)
    assert found["weights"] == pytest.approx(weights, rel=1e-3)
    assert found["gradients"] == pytest.approx(always["gradients"], rel=1e-3)
    assert found["moments"] == pytest.approx(always["AdamW's moments"], rel=1e-3)
    assert found["activations"] == update["activations of 1024 tokens"]
    gathered = [size for name, size in update.items() if "gathered" in name or "shared out" in name]
    assert found["gathered"] == pytest.approx(sum(gathered), rel=1e-3)


def test_bytes_that_are_sent_by_hand(scale: Any) -> None:
    """A model of 1.5 billion numbers on two machines of two."""
    cluster, step = scale.Cluster(2, 2, inside=100e9, between=10e9), scale.Step(1000, 3, False)

    class Sized(scale.Model):
        numbers = 1_500_000_000

    model = Sized("toy", 1, 1, 1, 1, 1)
    assert scale.sent(model, "none", cluster, step) == {"all-reduce, across": 2 * 6e9 * 3 / 4}
    assert scale.sent(model, "full", cluster, step) == {
        "all-gather, across": 3 * 2 * 3e9 * 3 / 4,
        "reduce-scatter, across": 3 * 6e9 * 3 / 4,
    }
    assert scale.sent(model, "hybrid", cluster, step) == {
        "all-gather, inside": 3 * 2 * 3e9 / 2,
        "reduce-scatter, inside": 3 * 6e9 / 2,
        "all-reduce, between": 3 * 2 * 3e9 / 2,
    }
    computing, sending = scale.seconds(model, "hybrid", cluster, step)
    assert computing == pytest.approx(6 * 1.5e9 * 1000 / (0.4 * 989e12))
    assert sending == pytest.approx((18e9 / 100e9 + 9e9 / 10e9) / 0.75)
    assert scale.seconds(model, "none", cluster, step)[1] == pytest.approx(9e9 / 20e9 / 0.75)
