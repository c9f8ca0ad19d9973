"""Where dpo's reference comes from: the start, a folder, a bootstrap, and a cache of log-probs."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.preferences import bootstrap as bootstraps
from rlhf_cli.preferences import cache
from rlhf_cli.preferences import reference as references
from rlhf_cli.rewards.models import ImplicitReward
from rlhf_cli.rewards.reward import load_reward
from rlhf_cli.stages import dpo, sft
from rlhf_cli.training.optimize import Optimizer
from tests.contents import without_times
from tests.tiny import WORDS, manifest, words_of
from tests.toys import FROZEN, run_of

ONCE = ["algo.epochs=1", "hardware.save_every=null"]
AHEAD = [*ONCE, "algo.precompute_reference=true", "reference_cache=cache"]


class Killed(Exception):
    """As if the process had been killed."""


@pytest.fixture(autouse=True)
def inside(chain: Path, tmp_path: Path) -> Iterator[None]:
    """Work in a copy of the chain's folder, which has no cache yet."""
    shutil.copytree(chain, tmp_path / "work", ignore=shutil.ignore_patterns(".reference"))
    with contextlib.chdir(tmp_path / "work"):
        yield


def run(out: str, *more: str) -> Path:
    return dpo.run(compose("dpo", [*words_of("dpo"), *more, f"out={out}"]))


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [without_times(each) for each in found]


def same(one: Path, other: Path) -> None:
    """The same bytes, metrics and manifest."""
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert metrics(one) == metrics(other)
    assert manifest(one) == manifest(other)


def cached() -> dict[str, tuple[dict[str, str], list[float]]]:
    """What the cache holds: by file its key and log-probs."""
    found = {}
    for file in Path("cache").glob("*"):
        with safe_open(file, framework="pt") as stored:
            found[file.name] = stored.metadata(), stored.get_tensor("logprobs").tolist()
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many times the reference has been made to score rows since the last question."""
    count = 0
    active = Reference.active

    def counting(reference: Reference) -> Any:
        nonlocal count
        count += 1
        return active(reference)

    def asked() -> int:
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(Reference, "active", counting)
    return asked


# --------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    "words",
    [[], ["algo=kto", "data.path=feedback.jsonl"], WORDS["lora"]],
    ids=["dpo", "kto", "lora"],
)
@pytest.mark.slow
def test_a_cache_changes_no_byte(words: list[str], passes: Callable[[], int]) -> None:
    """Without a cache, with one that it writes, and with one that it reads."""
    without = run("without", *AHEAD, *words, "reference_cache=null")
    assert not Path("cache").exists()
    first = run("first", *AHEAD, *words)
    after_writing = cached()
    assert len(after_writing) == 2  # held-out rows and training rows
    scored = passes()
    second = run("second", *AHEAD, *words)
    assert cached() == after_writing
    assert passes() == scored / 2 - 2  # this run alone has had no pass
    same(without, first)
    same(without, second)
    # nothing is left to estimate a KL to, unless the policy itself is the reference without adapter
    assert ("eval/kl" in manifest(first)["metrics"]) == (words == WORDS["lora"])
    assert "eval/kl" in manifest(run("in-memory", *ONCE, *words))["metrics"]


@pytest.mark.slow
def test_what_a_cache_is_read_for(passes: Callable[[], int]) -> None:
    """Whatever leaves the reference's log-probs alone; anything else is scored anew."""
    run("one", *AHEAD)
    assert passes() == 2
    others = ["algo.beta=0.9", "algo.lr=1e-3", "seed=5", "algo=ipo", "hardware.logprob_chunk=5"]
    for i, word in enumerate(others):
        null = ["algo.beta=null"] if word == "algo=ipo" else []
        run(f"again{i}", *AHEAD, word, *null)
        assert passes() == 0, word
    assert len(cached()) == 2
    shutil.copytree("runs/demo/sft", "elsewhere")
    for i, word in enumerate(
        [
            *("data.template='Do this. {prompt}'", "data.max_response_tokens=3"),
            *("data.eval_rows=9", "policy=elsewhere", "reference=runs/demo/adapter"),
        ]
    ):
        run(f"other{i}", *AHEAD, word, "data.long_prompts=cut", "data.long_responses=cut")
        assert passes() == 2, word
        assert len(cached()) == 4 + 2 * i


def test_what_is_read_is_what_is_compared_with() -> None:
    """Log-probs that are no longer the reference's would be noticed at the start."""
    run("one", *AHEAD)
    for file in Path("cache").iterdir():
        with safe_open(file, framework="pt") as stored:
            key = stored.metadata()
        other = load_file(file)["logprobs"] + 1
        key["values"] = cache.digest_of(other)
        save_file({"logprobs": other}, file, metadata=key)
    with pytest.raises(RunError, match="max_abs_log_ratio_at_start failed"):
        run("two", *AHEAD)


def test_a_reference_with_other_weights_is_scored_again(
    passes: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    run("one", *AHEAD)
    before = cached()
    assert passes() == 2
    weights = Path("runs/demo/sft/model.safetensors")
    tensors = {name: value * 1.01 for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    made = weights.with_name("stage.json")
    said = json.loads(made.read_text())
    del said["files"][weights.name]  # the change is meant
    made.write_text(json.dumps(said))
    capfd.readouterr()
    stale = run("two", *AHEAD)
    assert passes() == 2
    assert "stale, made with another reference" in capfd.readouterr().err
    after = cached()
    assert after.keys() == before.keys() and after != before  # it took the old one's place
    same(stale, run("three", *AHEAD, "reference_cache=null"))


@pytest.mark.parametrize("keep", [0, 7, 40, -3])
def test_a_damaged_cache_is_written_again(
    keep: int, passes: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    one = run("one", *AHEAD)
    before = cached()
    file = next(Path("cache").iterdir())
    file.write_bytes(file.read_bytes()[:keep])
    assert passes() == 2
    capfd.readouterr()
    same(one, run("two", *AHEAD))
    assert passes() == 1
    assert "damaged; the reference is scored again" in capfd.readouterr().err
    assert cached() == before


# --------------------------------------------------------------------------- the bootstrap


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_bootstrap_is_sft_on_the_chosen_side(model: str) -> None:
    """In one batch an epoch, so that both take the same steps; their orders of rows differ."""
    adapted = WORDS["lora"] if model == "lora" else []
    alike = [
        *("algo.batch_size=500", "algo.lr=4e-3", "hardware.save_every=null", "algo.warmup_steps=1"),
    ]
    out = run(
        *("out", *alike, *adapted, "reference=bootstrap", "algo.bootstrap_epochs=3"),
        *("algo.bootstrap_lr=4e-3", "algo.lr=1e-3", "algo.epochs=1"),
    )
    sizes = ("vocab_size", "hidden_size", "layers", "heads", "context")
    scratch = [word for word in words_of("sft") if not any(size in word for size in sizes)]
    lora = ["model=pretrained_lora", *WORDS["lora"][1:]]
    cfg = compose(
        "sft",
        [
            *(*scratch, *(lora if adapted else ["model=pretrained"]), *alike, "out=sft"),
            *("model.path=runs/demo/sft", "model.dropout=0", "algo.text_mix=0", "algo.epochs=3"),
            *("algo.keep=last", "algo.max_steps=null"),
            *("algo.lr_schedule=linear", "algo.min_lr_ratio=0"),
        ],
    )
    expected = sft.run(cfg)
    name = "adapter_model.safetensors" if adapted else "model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (out / "bootstrap", expected))
    assert ours.keys() == theirs.keys()
    for each, weight in ours.items():
        torch.testing.assert_close(weight, theirs[each], rtol=1e-3, atol=2e-5)

    said = manifest(out)["reference"]
    made = content_hash(str(out / "bootstrap"))
    assert said == {"kind": "bootstrap", "path": "bootstrap", "hash": made}
    implicit = manifest(out)["implicit_reward"]
    assert (implicit["reference"], implicit["hash"]) == ("bootstrap", made)
    first = metrics(out)[0]
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-5)  # both start from it


@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("when", ["early", "late", "after"])
@pytest.mark.slow
def test_a_run_killed_while_it_bootstraps_ends_the_same(
    when: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second step, while its folder is written, or when that has just been."""
    words = [*ONCE, "reference=bootstrap", *(WORDS["lora"] if model == "lora" else [])]
    whole = run("whole", *words)
    places = {
        "early": (Optimizer, "step"),
        "late": (bootstraps, "seal_whole"),
        "after": (references, "reference_of"),
    }
    owner, name = places[when]
    calls = 0
    function = getattr(owner, name)

    def dying(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or when != "early":
            raise Killed
        return function(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run("killed", *words)
    assert Path("killed/bootstrap").is_dir() == (when == "after")
    same(whole, run("killed", *words))
    assert not list(Path("killed").glob(".*"))


# --------------------------------------------------------------------------- folders


def test_a_folder_is_the_reference_whatever_the_policy(tmp_path: Path) -> None:
    """Policy and reference differ from the start, and nothing asks them to be one."""
    out = run("out", *ONCE, "policy=runs/demo/adapter", "reference=runs/demo/sft")
    said = manifest(out)
    hashed = content_hash("runs/demo/sft")
    assert said["reference"] == {"kind": "folder", "path": "runs/demo/sft", "hash": hashed}
    assert said["parents"]["reference"]["hash"] == hashed
    assert "max_abs_log_ratio_at_start" not in said["checks"]
    assert said["checks"]["reference_unchanged"] == 1
    assert abs(metrics(out)[0]["rewards/margin"]) > 0.01
    assert said["implicit_reward"]["reference"] == "../runs/demo/sft"
    alone = run("alone", *ONCE, "algo=simpo")
    assert "reference" not in manifest(alone) and "implicit_reward" not in manifest(alone)


def test_a_reference_that_cannot_pack_rows_does_not() -> None:
    """Its states run along the row."""
    tokenizer = load_tokenizer("runs/demo/sft", FROZEN)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1
    )
    MambaForCausalLM(config).save_pretrained("recurrent")
    tokenizer.save_pretrained("recurrent")
    packed, padded = (
        metrics(run(f"packing-{each}", *ONCE, "reference=recurrent", f"hardware.packing={each}"))
        for each in ("auto", "false")
    )
    assert packed[-1] == pytest.approx(padded[-1], rel=1e-4, abs=1e-4)


def test_a_policy_and_its_reference_may_move_together(tmp_path: Path) -> None:
    run("runs/demo/dpo", *ONCE)
    run("runs/demo/own", *ONCE, "reference=bootstrap")
    Path("runs").rename("moved")
    tokenizer = load_tokenizer("moved/demo/sft", FROZEN)
    for name in ("dpo", "own"):
        with contextlib.chdir(tmp_path):
            place = f"work/moved/demo/{name}"
            (term,) = load_reward(place, run_of(), tokenizer, torch.device("cpu")).terms
        assert isinstance(term.source, ImplicitReward)


def test_a_bootstrap_is_the_one_in_out_whatever_lies_about() -> None:
    """A folder of that name is nobody's reference."""
    shutil.copytree("runs/demo/adapter", "bootstrap")
    out = run("out", *ONCE, "reference=bootstrap")
    assert manifest(out)["implicit_reward"]["reference"] == "bootstrap"
    assert "reference" not in manifest(out)["parents"]


def test_a_loss_without_a_reference_may_start_from_a_bootstrap() -> None:
    out = run("out", *ONCE, "algo=simpo", "reference=bootstrap")
    made = content_hash(str(out / "bootstrap"))
    said = manifest(out)
    assert said["reference"] == {"kind": "bootstrap", "path": "bootstrap", "hash": made}
    assert "implicit_reward" not in said and "eval/kl" not in said["metrics"]
