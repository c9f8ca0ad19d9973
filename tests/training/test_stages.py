"""Whole stages on tiny models: resumed, repeated and cut differently they end the same."""

import contextlib
import importlib
import json
import math
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.data.kinds import Preference, Ranking
from rlhf_cli.data.rows import read_split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.models.adapters import snapshot
from rlhf_cli.models.layouts import batch_of, layout_of
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.reference import Reference
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.runs import out_folder as outfolder
from rlhf_cli.runs.out_files import STAGING, newest_step
from rlhf_cli.runs.preflight import preflight
from rlhf_cli.runs.session import Session
from rlhf_cli.stages import sft
from tests.contents import contents_of, without_times
from tests.pace import fast
from tests.tiny import DATA, WORDS, manifest, words_of
from tests.toys import FROZEN, bpe, hardware_of, llama

RANKINGS, FEEDBACK = "data.path=rankings.jsonl", "data.path=feedback.jsonl"
ONCE = "algo.epochs=1"
BOOTSTRAP = ["reference=bootstrap", "algo.bootstrap_epochs=2", "algo.bootstrap_lr=2e-3"]
NO_TARGET = ["algo.kl_target=null", "algo.kl_horizon=null"]
ON_POLICY = ["algo.clip=null", "algo.epochs=1", "algo.minibatch_size=8"]
WATCHED = ["gold=length:2", "algo.eval_every=1", "algo.eval_prompts=4", "algo.ema_decay=0.8"]
SCALED = ["algo.scale_rewards=true", "algo.overoptimised=9", "algo.max_length_drift=9"]
RUNS = {
    "sft": ["sft"],
    "sft on a model": ["sft", "model=pretrained", "model.path=runs/demo/sft"],
    "sft by reward": ["sft", "select_by=reward", "reward=regex:Hi"],
    "reward": ["reward"],
    "reward kwise": ["reward", "algo=kwise", RANKINGS, ONCE],
    "reward plackett_luce": ["reward", "algo=plackett_luce", RANKINGS, ONCE],
    "reward label": ["reward", "algo=pointwise", FEEDBACK, ONCE],
    "reward score": ["reward", "algo=pointwise", "algo.target=score", FEEDBACK, ONCE],
    "reward steps": [
        *("reward", "algo=process", "data.path=steps.jsonl", "data.long_responses=cut", ONCE)
    ],
    "reward token": ["reward", "algo=token", "algo.aggregate=sum", ONCE],
    "reward token lora": ["reward", "algo=token", *WORDS["lora"], ONCE],
    "dpo": ["dpo"],
    "dpo precomputed": ["dpo", "algo.precompute_reference=true"],
    "dpo lora": ["dpo", *WORDS["lora"]],
    "dpo lora precomputed": ["dpo", *WORDS["lora"], "algo.precompute_reference=true", ONCE],
    "dpo bootstrap": ["dpo", *BOOTSTRAP, ONCE],
    "dpo bootstrap lora": ["dpo", *BOOTSTRAP, *WORDS["lora"], ONCE],
    "dpo folder": ["dpo", "reference=runs/demo/adapter", ONCE],
    "dpo folder lora": [
        *("dpo", "policy=runs/demo/adapter", "reference=runs/demo/sft", *WORDS["lora"], ONCE)
    ],
    "dpo sft_coef": ["dpo", "algo.sft_coef=0.5", ONCE],
    "length_normalised": ["dpo", "algo=length_normalised", ONCE],
    "ipo": ["dpo", "algo=ipo", "algo.beta=null", ONCE],
    "kto": ["dpo", "algo=kto", FEEDBACK, ONCE],
    "kto precomputed": ["dpo", "algo=kto", FEEDBACK, "algo.precompute_reference=true", ONCE],
    "plackett_luce": ["dpo", "algo=plackett_luce", RANKINGS, ONCE],
    "orpo": ["dpo", "algo=orpo", "algo.beta=null", ONCE],
    "simpo": ["dpo", "algo=simpo", ONCE],
    "preferred_ft": ["dpo", "algo=preferred_ft", "algo.beta=null", ONCE],
    "ppo": ["ppo"],
    "ppo rule": ["ppo", "reward=regex:a", "algo.value_clip=null"],
    "ppo watched": ["ppo", *WATCHED, "algo.critic=shared", "algo.keep=eval/gold", *SCALED],
    "ppo lora": ["ppo", *WORDS["lora"], "algo.kl_controller=fixed", *NO_TARGET],
    "ppo four roles": [
        *("ppo", *WORDS["lora"], "reward=runs/demo/reward_adapter"),
        *("policy=runs/demo/adapter", "hardware.gradient_checkpointing=true"),
    ],
    "ppo lora rule": ["ppo", *WORDS["lora"], "reward=regex:a"],
    "ppo frozen": ["ppo", "model.frozen_layers=1"],
    "ppo_klpen": ["ppo", "algo=ppo_klpen", "algo.clip=null", "algo.old_kl_target=1e-4"],
    "a2c": ["ppo", "algo=a2c", *ON_POLICY, *NO_TARGET, "algo.kl_controller=fixed"],
    "reinforce": ["ppo", "algo=reinforce", *ON_POLICY, "algo.value_lr=null"],
    "grpo": ["grpo"],
    "grpo watched": ["grpo", *WATCHED, "algo.keep=reward", "algo.ema_decay=null"],
    "grpo refreshed": ["grpo", "algo.refresh_reference=2", "algo.ema_decay=0.8"],
    "grpo refreshed lora": ["grpo", *WORDS["lora"], "algo.refresh_reference=3"],
    "grpo_process": ["grpo", "algo=grpo_process", "reward=steps.py:short", "data.step_end=' '"],
    "rloo": ["grpo", "algo=rloo", *ON_POLICY],
    "reinforce_pp": ["grpo", "algo=reinforce_pp", "algo.group_size=1"],
    "dapo": ["grpo", "algo=dapo", "algo.dynamic_sampling=2"],
    "gspo": ["grpo", "algo=gspo", "algo.clip=3e-4"],
    "cispo": ["grpo", "algo=cispo", "algo.clip=null"],
    "grpo adapter": ["grpo", "policy=runs/demo/adapter", *WORDS["lora"]],
}


class Killed(Exception):
    """As if the process had been killed."""


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, as a user would."""
    with contextlib.chdir(chain):
        yield


def run(name: str, out: Path, *more: str) -> Path:
    stage, *words = RUNS[name]
    scratch = words_of(stage)
    if "model=pretrained" in words:  # the sizes belong to models from scratch
        sizes = ("vocab_size", "hidden_size", "layers", "heads", "context")
        scratch = [each for each in scratch if not any(size in each for size in sizes)]
    cfg = compose(stage, [*scratch, *words, f"out={out}", *more])
    found: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(cfg)
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(file: Path) -> list[dict[str, Any]]:
    """The lines without what a clock says."""
    return [without_times(each) for each in lines(file)]


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


def same(one: Path, other: Path) -> None:
    """The same bytes, metrics, samples and manifest."""
    assert weights(one) and weights(one) == weights(other)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert untimed(one / name) == untimed(other / name)
    assert manifest(one) == manifest(other)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die once the metrics of `step` are written and before its resume point is."""
    write = JsonLines.write

    def dying(log: JsonLines, number: int, values: dict[str, Any]) -> None:
        write(log, number, values)
        if number == step and log.file.name == "metrics.jsonl":
            raise Killed

    monkeypatch.setattr(JsonLines, "write", dying)


@pytest.mark.parametrize(
    "name", fast(["sft", "reward", "dpo", "kto", "ppo", "grpo", "grpo adapter"], RUNS)
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(name, tmp_path / "whole")
    assert not (whole / "checkpoints").exists() and not (whole / STAGING).exists()
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            run(name, out)
    assert [entry["step"] for entry in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert newest_step(out) == 2
    assert not weights(out) and not (out / "stage.json").exists()
    run(name, out)
    same(whole, out)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo", "grpo"])
@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_model_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resume point is that of the last step: nothing is left to train."""
    last = ["algo.epochs=1"] if name in ("reward", "dpo") else []
    whole = run(name, tmp_path / "whole", "hardware.save_every=1", *last)
    out = tmp_path / "killed"

    def dying(session: Session, *args: Any, **more: Any) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish", dying)
        with pytest.raises(Killed):
            run(name, out, "hardware.save_every=1", *last)
    assert not weights(out) and (out / "checkpoints").exists()
    run(name, out, "hardware.save_every=1", *last)
    same(whole, out)


SAMPLED = {
    "generate": ["reward=runs/demo/reward", "algo.samples=2", "algo.prompts=4"],
    "evaluate": [
        *("reference=runs/demo/sft", "baselines=[runs/demo/adapter]", "reward=runs/demo/reward"),
        *("gold=length:5", "algo.samples=2", "algo.prompts=4"),
    ],
}


@pytest.mark.parametrize("name", ["sft", "reward", "dpo lora", "ppo", "grpo", *SAMPLED])
@pytest.mark.slow
def test_the_seed_alone_decides(name: str, tmp_path: Path) -> None:
    """All that is left in `out` is the same the second time, and with another seed it is not."""
    out = tmp_path / "out"

    def made(*more: str) -> dict[str, Any]:
        if name in SAMPLED:
            sampled(name, out, *SAMPLED[name], *more)
        else:
            run(name, out, *more)
        return contents_of(out)

    first = made()
    shutil.rmtree(out)
    assert made() == first
    another = made("seed=1", "overwrite=true")
    results = [*weights(out)] or [{"generate": "samples.jsonl", "evaluate": "report.json"}[name]]
    assert all(another[file] != first[file] for file in results)


RARELY = ["algo.show_every=4", "algo.eval_every=2", "algo.eval_prompts=4", "gold=length:2"]
ONLINE = (["algo.show_every=1", "algo.eval_every=null"], RARELY)
SHOWN = {
    **dict.fromkeys(("sft", "reward", "dpo"), (["algo.eval_every=2"], ["algo.eval_every=5"])),
    **dict.fromkeys(("ppo", "grpo"), ONLINE),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_and_saved_changes_nothing(name: str, tmp_path: Path) -> None:
    """Neither evaluations nor samples nor resume points take a random number from training."""
    outs, evaluated, logs = [], [], []
    for shown, every in zip(SHOWN[name], ("1", "null"), strict=True):
        words = ["algo.keep=last", *shown, f"hardware.save_every={every}"]
        outs.append(run(name, tmp_path / every, *words))
        log = untimed(outs[-1] / "metrics.jsonl")
        evaluated.append([any(key.startswith("eval/") for key in each) for each in log])
        logs.append(
            [{key: each[key] for key in each if not key.startswith("eval/")} for each in log]
        )
    assert weights(outs[0]) == weights(outs[1])
    assert logs[0] == logs[1] and evaluated[0] != evaluated[1]
    if name in ("ppo", "grpo"):
        often, rarely = (lines(out / "samples.jsonl") for out in outs)
        assert {row["step"] for row in often} == {1, 2, 3, 4, 5, 6}
        assert rarely == [row for row in often if row["step"] in (1, 4, 6)]


# what the other losses share with one of these is not run once more
CUT = [
    *("sft", "reward", "reward kwise", "reward plackett_luce", "reward label", "reward score"),
    *("reward steps", "reward token", "dpo", "dpo bootstrap", "dpo sft_coef", "length_normalised"),
    *("kto", "plackett_luce", "orpo", "ppo", "ppo watched", "a2c", "grpo", "gspo", "rloo"),
]


@pytest.mark.parametrize("name", fast(["sft", "reward", "dpo", "kto", "ppo", "grpo"], CUT))
def test_hardware_changes_no_metric(name: str, tmp_path: Path) -> None:
    """Small micro-batches and rollouts, small chunks, recomputed activations, prompts repeated."""
    stage = RUNS[name][0]
    # dropout's draws follow the batch; what raises good responses alone raises kto's baseline
    raising = ["algo.desirable_weight=1.5", "algo.undesirable_weight=0"]
    plain = {"sft": ["model.dropout=0"], "kto": raising}.get(name, [])
    one = run(name, tmp_path / "one", *plain)
    other = run(
        name,
        tmp_path / "other",
        *plain,
        *("hardware.tokens_per_microbatch=48", "hardware.logprob_chunk=3"),
        *("hardware.gradient_checkpointing=true", "hardware.save_every=null"),
        *(["hardware.rollout_tokens=70"] if stage in ("dpo", "ppo", "grpo") else []),
        "hardware.packing=false",
    )
    ours, theirs = untimed(one / "metrics.jsonl"), untimed(other / "metrics.jsonl")
    assert len(ours) == len(theirs) >= 5
    for entry, again in zip(ours, theirs, strict=True):
        if stage == "dpo" and entry["step"] <= 2:  # margins of 0 up to rounding have any sign
            del entry["rewards/accuracy"], again["rewards/accuracy"]
        assert again == pytest.approx(entry, rel=1e-4, abs=1e-5)
    if stage in ("ppo", "grpo"):
        texts = [[row["response"] for row in lines(out / "samples.jsonl")] for out in (one, other)]
        assert texts[0] == texts[1]
    if name == "kto":  # the baseline is one of the whole step, and not always cut off at 0
        assert max(entry["z0"] for entry in ours) > 0.01


def test_what_the_runs_above_share_is_shared() -> None:
    """Otherwise hardware.packing=false would have changed less than it may."""
    tokenizer = load_tokenizer("runs/demo/sft", FROZEN)
    model = load_policy("runs/demo/sft", FROZEN, tokenizer, torch.device("cpu"))
    layout = layout_of(model, hardware_of())
    for kind, file in ((Preference, "rows"), (Ranking, "rankings")):
        data = compose("dpo", [*words_of("dpo"), f"data.path={file}.jsonl"]).data
        items = Encoder(tokenizer, data).answers(read_split(data, kind).train)
        assert (batch_of(model, items, layout).stands_for > 1).any()


# --------------------------------------------------------------------------- hand-offs


def checks(out: Path) -> dict[str, float]:
    found: dict[str, float] = manifest(out)["checks"]
    return found


@pytest.mark.parametrize("name", ["dpo", "dpo precomputed", "dpo lora"])
def test_dpo_starts_at_ln_2(name: str, tmp_path: Path) -> None:
    found = checks(run(name, tmp_path / "out", "algo.epochs=1"))
    assert found["dpo_loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["dpo_margin_at_start"] == pytest.approx(0, abs=1e-5)
    assert found["eos_ids_missing"] == 0


def test_dpo_starts_near_ln_2_in_bfloat16(tmp_path: Path) -> None:
    """Rounding parts what is computed in batches of another shape; that is no other model."""
    few = ["algo.epochs=1", "model.dtype=bfloat16", "hardware.tokens_per_microbatch=100"]
    found = checks(run("dpo", tmp_path / "out", *few))
    assert found["dpo_loss_at_start"] == pytest.approx(math.log(2), abs=0.05)


def test_plain_text_is_imitated_as_well(tmp_path: Path) -> None:
    out = run("sft", tmp_path / "out", "data.path=text.jsonl", "algo.text_mix=0")
    losses = [each["eval/loss"] for each in lines(out / "metrics.jsonl") if "eval/loss" in each]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("model", "policy"), fast([("lora", "adapter")], product(["full", "lora"], ["sft", "adapter"]))
)
def test_an_adapter_is_handed_on_as_base_plus_adapter(
    policy: str, model: str, tmp_path: Path
) -> None:
    words = [f"policy=runs/demo/{policy}", *(WORDS["lora"] if model == "lora" else [])]
    out = run("dpo", tmp_path / "out", *words, "algo.epochs=1")
    found = checks(out)
    assert found["dpo_loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert (out / "adapter_config.json").exists() == (model == "lora")
    start = manifest(Path(f"runs/demo/{policy}"))["metrics"]
    first, last = lines(out / "metrics.jsonl")[0], lines(out / "metrics.jsonl")[-1]
    assert last["eval/loss"] < math.log(2)  # and it was trained
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert start
    followed = run("dpo", tmp_path / "next", f"policy={out}", *words[1:], "algo.epochs=1")
    assert checks(followed)["dpo_loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    reward = run("reward", tmp_path / "reward", f"policy={out}", *words[1:])
    assert manifest(reward)["metrics"]["eval/accuracy"] > 0.5
    ppo = run(
        "ppo", tmp_path / "ppo", f"policy={out}", f"reward={reward}", *words[1:], "algo.steps=1"
    )
    assert checks(ppo)["critic_minus_reward_at_start"] == pytest.approx(0, abs=1e-5)
    assert checks(ppo)["kl_to_reference_at_start"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["ppo", "ppo rule", "ppo four roles", "grpo", "grpo adapter"])
def test_the_first_ratio_is_1_and_the_first_kl_0(name: str, tmp_path: Path) -> None:
    """With one update an iteration the very first loss is on policy: nothing can be clipped."""
    once = ["algo.steps=2", "algo.epochs=1", "algo.minibatch_size=8", "hardware.save_every=null"]
    out = run(name, tmp_path / "out", *once)
    found = checks(out)
    assert found["max_abs_log_ratio_at_start"] < 1e-5
    assert found["kl_to_reference_at_start"] == pytest.approx(0, abs=1e-5)
    assert found["reference_unchanged"] == 1
    first = lines(out / "metrics.jsonl")[0]
    assert first["clip_fraction"] == 0 and first["kl"] == pytest.approx(0, abs=1e-5)
    if "ppo" in name:
        assert first["old_kl"] < 1e-9
        assert first["rlhf_reward"] == pytest.approx(first["reward"], abs=1e-4)
    else:  # groups weigh nothing in sum, each response by its own length
        assert first["loss/policy"] == pytest.approx(0, abs=1e-5)
    if name == "ppo":
        assert found["critic_minus_reward_at_start"] == 0
        assert found["reward_accuracy"] > 0.5


def test_the_adaptive_coefficient_follows_the_measured_kl(tmp_path: Path) -> None:
    entries = lines(run("ppo", tmp_path / "out") / "metrics.jsonl")
    for before, after in zip(entries, entries[1:], strict=False):
        error = min(max(before["kl"] / 0.5 - 1, -0.2), 0.2)
        expected = before["kl_coef"] * (1 + error * 8 / 100)
        assert after["kl_coef"] == pytest.approx(expected, rel=1e-5)


def test_plain_transformers_reads_what_stages_write(chain: Path) -> None:
    policy, reward = chain / "runs/demo/sft", chain / "runs/demo/reward"
    for place, auto in (
        (policy, AutoModelForCausalLM),
        (reward, AutoModelForSequenceClassification),
    ):
        loader: Any = auto
        model, info = loader.from_pretrained(place, output_loading_info=True)
        assert not any(info.values()), info
        assert model.config.pad_token_id == AutoTokenizer.from_pretrained(place).pad_token_id
    found = manifest(policy)
    assert (found["stage"], found["kind"], found["complete"]) == ("sft", "policy", True)
    assert found["metrics"]["eval/loss"] > 0
    scored = manifest(reward)
    assert scored["kind"] == "reward" and scored["reward"]["std"] > 0
    assert scored["parents"]["policy"]["hash"] == content_hash(str(policy))
    assert scored["metrics"]["eval/accuracy"] > 0.9


def test_a_failed_hand_off_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is another model is noticed before the first update."""
    from rlhf_cli.preferences import reference as references

    class Other(Reference):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            model.get_output_embeddings().weight.data.mul_(1.5)

    monkeypatch.setattr(references, "Reference", Other)
    with pytest.raises(RunError, match=r"max_abs_log_ratio_at_start failed .* not the same model"):
        run("dpo", tmp_path / "out")
    assert not (tmp_path / "out" / "stage.json").exists()


@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 6)])
def test_the_weights_that_were_asked_for_are_kept(
    keep: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss is made to be lowest at step 4 of 6."""
    held_out = iter([3.0, 1.0, 2.0, *[9.0] * 9])  # at steps 2, 4, 6, and at the end
    monkeypatch.setattr(sft, "held_out_loss", lambda name, *args: {name: next(held_out)})
    seen: dict[int, Any] = {}

    def spy(session: Session, number: int, networks: Any, *args: Any) -> None:
        weights = snapshot(networks["policy"])
        seen[number] = {name: weight.cpu() for name, weight in weights.items()}

    monkeypatch.setattr(Session, "save", spy)
    out = run("sft", tmp_path / "out", f"algo.keep={keep}")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in seen[step].items())
    assert not torch.equal(seen[4]["model.norm.weight"], seen[6]["model.norm.weight"])


@pytest.mark.parametrize("reward", ["regex:Hi", "runs/demo/reward"])
def test_a_reward_may_choose_other_weights_than_the_held_out_loss(
    reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy greets, and unlearns it: each evaluation has a lower loss, and less reward."""
    unlearn = ["data.columns.chosen=rejected", "data.columns.rejected=chosen", "algo.text_mix=0"]
    words = [
        *unlearn,
        "seed=2",
        "model.dropout=0",
        "algo.lr=1e-2",
        "algo.eval_every=2",
        "algo.max_steps=6",
    ]
    seen: dict[int, Any] = {}

    def spy(session: Session, number: int, networks: Any, *args: Any) -> None:
        weights = snapshot(networks["policy"])
        seen[number] = {name: weight.cpu() for name, weight in weights.items()}

    monkeypatch.setattr(Session, "save", spy)
    by_reward = ["select_by=reward", f"reward={reward}"]
    for name, more in (("loss", []), ("reward", by_reward)):
        out = run("sft on a model", tmp_path / name, *words, *more)
        log = [each for each in lines(out / "metrics.jsonl") if "eval/loss" in each]
        losses = [each["eval/loss"] for each in log]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
        kept, place = manifest(out)["metrics"], 2
        if more:  # the first evaluation has the most, but for what little a GPU rounds otherwise
            rewards = [each["eval/reward"] for each in log]
            place = rewards.index(max(rewards))
            assert place < 2 and kept["eval/reward"] == pytest.approx(rewards[place])
            assert ("reward" in manifest(out)["parents"]) == ("/" in reward)
        assert kept["eval/loss"] == pytest.approx(losses[place], rel=1e-5)
        found, best = load_file(out / "model.safetensors"), seen[log[place]["step"]]
        assert all(torch.equal(found[key], weight) for key, weight in best.items())


def test_a_chat_policy_ends_its_turns_in_every_tool(tmp_path: Path) -> None:
    """Trained to end with the template's end of turn, the folder generates until it or the EOS."""
    tokenizer = bpe(chat=True)
    llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = [f"model.path={tmp_path / 'base'}", "data.template=chat", "data.max_prompt_tokens=64"]
    out = run("sft on a model", tmp_path / "out", *base)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert manifest(out)["eos_ids"] == sorted([tokenizer.eos_token_id, end])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == manifest(out)["eos_ids"]
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    chat = [f"policy={out}", "data.template=chat", "data.max_prompt_tokens=64", "algo.epochs=1"]
    found = checks(run("dpo", tmp_path / "next", *chat))
    assert found["eos_ids_missing"] == 0
    (out / "generation_config.json").write_text('{"eos_token_id": 2}')
    said = json.loads((out / "stage.json").read_text())
    del said["files"]["generation_config.json"]  # as if the change were meant
    (out / "stage.json").write_text(json.dumps(said))
    with pytest.raises(RunError, match="eos_ids_missing failed .* was trained to end with ids"):
        run("dpo", tmp_path / "changed", *chat)


# --------------------------------------------------------------------------- sampling stages


def sampled(stage: str, out: Path, *more: str) -> Path:
    words = [*DATA, "policy=runs/demo/sft", f"out={out}", *more]
    found: Path = importlib.import_module(f"rlhf_cli.stages.{stage}").run(compose(stage, words))
    return found


def test_generate_writes_what_it_sampled(tmp_path: Path) -> None:
    words = ["algo.samples=3", "algo.prompts=4", "reward=runs/demo/reward"]
    found = lines(sampled("generate", tmp_path / "one", *words) / "samples.jsonl")
    assert len(found) == 12
    assert [row["prompt"] for row in found[:3]] == [found[0]["prompt"]] * 3
    for row in found:
        assert row["finish_reason"] in ("eos", "length") and row["logprob"] < 0
        assert 1 <= row["response_tokens"] <= 8 and math.isfinite(row["reward"])
    again = lines(sampled("generate", tmp_path / "two", *words) / "samples.jsonl")
    assert again == found
    beams = ["algo.beams=4", "algo.samples=2", "algo.prompts=2", "algo.length_penalty=0"]
    best = lines(sampled("generate", tmp_path / "beams", *beams) / "samples.jsonl")
    greedy = ["algo.temperature=0", "algo.prompts=2"]
    plain = lines(sampled("generate", tmp_path / "greedy", *greedy) / "samples.jsonl")
    for i in range(2):
        assert best[2 * i]["logprob"] >= best[2 * i + 1]["logprob"] - 1e-5
        assert best[2 * i]["logprob"] >= plain[i]["logprob"] - 1e-4


def test_a_policy_judged_against_itself(tmp_path: Path) -> None:
    words = ["reference=runs/demo/sft", "reward=regex:a", "gold=null", "algo.samples=3"]
    base = ["baselines=[runs/demo/adapter]", "algo.prompts=6"]
    report = json.loads((sampled("evaluate", tmp_path, *words, *base) / "report.json").read_text())
    own, other = report["policies"].values()
    assert own["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert other["kl"]["mean"] > 0.01
    assert 0 <= own["reward"]["mean"] <= 1
    (wins,) = report["win_rates"].values()
    assert wins["win"] + wins["tie"] + wins["loss"] == pytest.approx(1, abs=1e-5)
    assert wins["low"] <= wins["win"] + wins["tie"] / 2 <= wins["high"]


def test_responses_of_two_policies_are_independent(tmp_path: Path) -> None:
    """With shared noise a copy of the policy would tie with it every time."""
    shutil.copytree("runs/demo/sft", tmp_path / "copy")
    words = ["reference=runs/demo/sft", "reward=length:30", "gold=null", "algo.samples=1"]
    base = [f"baselines=[{tmp_path}/copy]"]
    report = json.loads(
        (sampled("evaluate", tmp_path / "out", *words, *base) / "report.json").read_text()
    )
    (wins,) = report["win_rates"].values()
    assert wins["tie"] < 1


def test_a_report_is_made_again_when_there_is_another_policy(tmp_path: Path) -> None:
    shutil.copytree("runs/demo/sft", tmp_path / "chain/sft")
    words = ["reference=null", "reward=regex:a", "gold=null", "algo.samples=1", "algo.prompts=3"]
    judged = f"policy={tmp_path}/chain/sft"

    def policies() -> int:
        out = sampled("evaluate", tmp_path / "out", *words, judged)
        return len(json.loads((out / "report.json").read_text())["policies"])

    assert policies() == 1
    before = (tmp_path / "out/report.json").stat().st_mtime_ns
    assert policies() == 1 and (tmp_path / "out/report.json").stat().st_mtime_ns == before
    shutil.copytree("runs/demo/sft", tmp_path / "chain/other")
    assert policies() == 2


def test_beams_have_no_kl(tmp_path: Path) -> None:
    words = ["reference=runs/demo/sft", "reward=regex:a", "gold=null", "algo.samples=2"]
    beams = ["baselines=[]", "algo.beams=2", "algo.prompts=3"]
    report = json.loads((sampled("evaluate", tmp_path, *words, *beams) / "report.json").read_text())
    (own,) = report["policies"].values()
    assert "kl" not in own


# --------------------------------------------------------------------------- out folders


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    out = run("dpo", tmp_path / "out", "algo.epochs=1")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    more = ["algo.epochs=1", "hardware.tokens_per_microbatch=64"]  # no other mathematics
    assert run("dpo", out, *more) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"made by another config \(algo.beta: 0.3 -> 0.4\)"):
        run("dpo", out, "algo.epochs=1", "algo.beta=0.4")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    again = run("dpo", out, "algo.epochs=1", "algo.beta=0.4", "overwrite=true")
    assert lines(again / "metrics.jsonl") and "beta: 0.4" in (again / "config.yaml").read_text()


def test_a_half_written_folder_is_no_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the weights and stage.json, the folder looks like anybody's model."""
    out = tmp_path / "out"

    def dying(folder: Path, manifest: dict[str, Any], names: set[str]) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(outfolder, "seal", dying)
        with pytest.raises(Killed):
            run("dpo", out, "algo.epochs=1")
    assert weights(out)
    with pytest.raises(UserError, match="no finished"):
        preflight(compose("dpo", [*words_of("dpo"), f"policy={out}", f"out={tmp_path / 'next'}"]))
    run("dpo", out, "algo.epochs=1")
    assert manifest(out)["complete"]
