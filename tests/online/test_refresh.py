"""A reward model that learns from what the policy writes: when, from what, and to what end."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.config.compose import compose
from rlhf_cli.config.errors import UserError
from rlhf_cli.data.items import Answers
from rlhf_cli.models.adapters import is_adapted
from rlhf_cli.models.score import scores_of
from rlhf_cli.models.scorers import load_scorer
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.online import roles
from rlhf_cli.online.refresh import RewardRefresh, best_and_worst
from rlhf_cli.reporting.metrics import JsonLines
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.runs.policy import policy_of
from rlhf_cli.runs.preflight import preflight
from rlhf_cli.runs.session import Session
from rlhf_cli.stages import grpo, reward
from tests.contents import without_times
from tests.tiny import WORDS, words_of
from tests.toys import FROZEN, hardware_of

REWARD, ADAPTER = "runs/demo/reward", "runs/demo/reward_adapter"
REFRESH = [
    *(f"reward={REWARD}", "judge=regex:H", "algo.refresh_reward=2", "algo.refresh_lr=1e-3"),
    *("algo.refresh_batch_size=4", "algo.refresh_replay=0.25"),
]
LORA = [*WORDS["lora"], f"reward={ADAPTER}"]
NEVER = [f"algo.refresh_{name}=null" for name in ("reward", "lr", "batch_size", "replay")]
KINDS = {"full": [], "lora": LORA, "reference too": ["algo.refresh_reference=2"]}


class Killed(Exception):
    """As if the process had been killed."""


@pytest.fixture(autouse=True)
def inside(chain: Path) -> Iterator[None]:
    """Work in the chain's folder, which gets a reward model that is an adapter."""
    with contextlib.chdir(chain):
        if not Path(ADAPTER, "stage.json").exists():
            words = [*words_of("reward"), *WORDS["lora"], f"out={ADAPTER}"]
            reward.run(compose("reward", [*words, "hardware.save_every=null"]))
        yield


def config(out: Path | str, *more: str) -> Any:
    return compose("grpo", [*words_of("grpo"), *REFRESH, f"out={out}", *more])


def run(out: Path, *more: str) -> Path:
    return grpo.run(config(out, *more))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(out: Path) -> list[dict[str, Any]]:
    return [without_times(each) for each in lines(out / "metrics.jsonl")]


def pairs_of(out: Path, steps: Sequence[int]) -> list[Answers]:
    """The pairs that were collected in these steps."""
    rows = [row for row in lines(out / "pairs.jsonl") if row["step"] in steps]
    return [Answers(row["prompt"], [row["chosen"], row["rejected"]], None) for row in rows]


def scores_by(folder: str | Path, pairs: list[Answers]) -> Tensor:
    """(N, 2) raw scores of better and worse responses by the model in a folder."""
    tokenizer = load_tokenizer(str(folder), FROZEN)
    scorer = load_scorer(str(folder), FROZEN, tokenizer, torch.device("cpu"))
    sequences = [each for pair in pairs for each in pair.sequences]
    return scores_of(scorer, sequences, hardware_of()).view(-1, 2).double()


# --------------------------------------------------------------------------- pairs


def test_a_group_gives_its_best_and_its_worst() -> None:
    """Equal groups give nothing; of equal responses the first; what has no judgement is left."""
    nan = math.nan
    scores = [[1.0, 3, 2], [2, 2, 2], [nan, 5, nan], [nan, 0, -1], [7, 4, 7], [nan, nan, nan]]
    assert list(best_and_worst(torch.tensor(scores).flatten(), 3)) == [(1, 0), (10, 11), (12, 13)]


def test_pairs_are_labelled_by_the_judge_alone(tmp_path: Path) -> None:
    """Whatever the reward says: the better response has an H, the worse has none."""
    out = run(tmp_path / "out")
    tokenizer = load_tokenizer(REWARD, FROZEN)
    pairs = pairs_of(out, range(1, 7))
    assert len(pairs) > 10
    for pair in pairs:
        better, worse = (tokenizer.decode(ids, skip_special_tokens=True) for ids in pair.responses)
        assert "H" in better and "H" not in worse
    found = untimed(out)
    assert all(0 < each["judge"] < 1 for each in found)
    for step in (2, 4, 6):
        assert found[step - 1]["refresh/pairs"] == len(pairs_of(out, [step - 1, step]))


# --------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_first_loss_is_that_of_the_pairs_under_the_old_model(kind: str, tmp_path: Path) -> None:
    """One batch of new pairs: mean of log(1 + exp(r_l - r_w)), before anything has moved."""
    whole = ["algo.refresh_batch_size=1000", "algo.refresh_replay=0", *KINDS[kind]]
    out = run(tmp_path / "out", *whole, "algo.steps=2")
    start = ADAPTER if kind == "lora" else REWARD
    scores = scores_by(start, pairs_of(out, [1, 2]))
    better, worse = scores.unbind(-1)
    log = untimed(out)
    assert not any(name.startswith("refresh/") for name in log[0])
    assert log[1]["refresh/replayed"] == 0
    expected = torch.log1p(torch.exp(worse - better)).mean().item()
    assert log[1]["refresh/loss"] == pytest.approx(expected, rel=1e-4)
    accuracy = (better > worse).double().mean().item()
    assert log[1]["refresh/accuracy_before"] == pytest.approx(accuracy, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_folder_holds_the_model_and_the_scale_of_the_last_refresh(
    kind: str, tmp_path: Path
) -> None:
    """Scores of the last new pairs have mean 0 and deviation 1, whoever reads the folder."""
    out = run(tmp_path / "out", *KINDS[kind])
    pairs = pairs_of(out, [5, 6])
    scores = scores_by(out / "reward", pairs)
    found = json.loads((out / "reward" / "stage.json").read_text())
    assert found["reward"]["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert found["reward"]["std"] == pytest.approx(scores.std().item(), rel=1e-4)
    assert (out / "reward" / "adapter_config.json").exists() == (kind == "lora")
    log = untimed(out)[-1]
    better, worse = scores.unbind(-1)
    accuracy = (better > worse).double().mean().item()
    assert log["refresh/accuracy"] == pytest.approx(accuracy, rel=1e-5)  # logs have six digits
    before = scores_by(ADAPTER if kind == "lora" else REWARD, pairs)
    assert not torch.allclose(before, scores, atol=1e-3)
    assert bradley_terry(scores) < bradley_terry(before)
    assert found["kind"] == "reward" and found["level"] == "response"
    assert found["parents"]["reward"]["path"] == (ADAPTER if kind == "lora" else REWARD)
    assert "eval/accuracy" not in found["metrics"]  # that was another model's
    words = [*KINDS[kind], f"reward={out / 'reward'}", *NEVER, "judge=null", "algo.steps=1"]
    followed = run(tmp_path / "next", *words)
    assert not (followed / "reward").exists() and not (followed / "pairs.jsonl").exists()


def bradley_terry(scores: Tensor) -> float:
    return torch.log1p(torch.exp(scores[:, 1] - scores[:, 0])).mean().item()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_reward_model_moves_at_refreshes_only_and_moves_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Tensor], float]] = []
    moved: list[set[str]] = []
    collect, train = RewardRefresh.collect, RewardRefresh.train
    policies: list[Any] = []

    def spy(refresh: RewardRefresh, step: int, rollouts: Sequence[Rollout]) -> Any:
        model = refresh.source.model
        weights = {name: each.detach().clone() for name, each in model.named_parameters()}
        seen.append((weights, refresh.source.std))
        assert not any(each.requires_grad for each in model.parameters())
        return collect(refresh, step, rollouts)

    def watched(refresh: RewardRefresh, step: int) -> Any:
        model = policies[0].model
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        flags = [each.requires_grad for each in model.parameters()]
        found = train(refresh, step)
        after = dict(model.named_parameters())
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
        assert flags == [each.requires_grad for each in model.parameters()]
        return found

    def role(*args: Any) -> Any:
        policies.append(policy_of(*args))
        return policies[-1]

    monkeypatch.setattr(RewardRefresh, "collect", spy)
    monkeypatch.setattr(RewardRefresh, "train", watched)
    monkeypatch.setattr(roles, "policy_of", role)
    run(tmp_path / "out", *KINDS[kind])
    for step in range(2, 7):  # a refresh ends steps 2 and 4
        (before, old), (after, new) = seen[step - 2], seen[step - 1]
        still = [torch.equal(before[name], after[name]) for name in before]
        assert not any(still) if step in (3, 5) else all(still)
        assert (old != new) == (step in (3, 5))
    assert len(moved) == 3
    for names in moved:
        assert all(".reward." in name for name in names)
        assert bool(names) == (kind == "lora")  # there the base that bears the adapter is shared
    assert is_adapted(policies[0].model) == (kind == "lora")


def test_frozen_layers_that_the_policy_lends_are_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[set[str]] = []
    init = RewardRefresh.__init__

    def spy(refresh: Any, cfg: Any, session: Session, policy: Any, *rest: Any) -> None:
        init(refresh, cfg, session, policy, *rest)
        lent = {id(each) for each in policy.model.parameters()}
        model = refresh.source.model
        found.append({name for name, each in model.named_parameters() if id(each) in lent})
        assert set(refresh._weights) == dict(model.named_parameters()).keys() - found[0]

    monkeypatch.setattr(RewardRefresh, "__init__", spy)
    made = ["hardware.save_every=null", "algo.steps=1"]
    # a reward model whose embeddings are still the policy's
    words = [*words_of("reward"), "model.frozen_layers=1", "algo.lr=5e-2"]
    frozen = reward.run(compose("reward", [*words, f"out={tmp_path / 'frozen'}"]))
    more = ["model.frozen_layers=1", f"reward={frozen}", "algo.refresh_reward=1"]
    run(tmp_path / "out", *made, *more)
    assert any("embed" in name for name in found[0])
    before, after = (scores_of_folder(each) for each in (frozen, tmp_path / "out" / "reward"))
    assert all(torch.equal(before[name], after[name]) for name in found[0])
    assert not torch.equal(before["score.weight"], after["score.weight"])


def scores_of_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a reward folder."""
    tokenizer = load_tokenizer(str(folder), FROZEN)
    return load_scorer(str(folder), FROZEN, tokenizer, torch.device("cpu")).state_dict()


def test_a_reward_model_that_is_wrong_is_put_right(tmp_path: Path) -> None:
    """It was taught to like rude responses. The judge likes an H, of responses of one token."""
    wrong = ["data.columns.chosen=rejected", "data.columns.rejected=chosen", "algo.epochs=6"]
    words = [*words_of("reward"), *wrong, "hardware.save_every=null"]
    folder = reward.run(compose("reward", [*words, f"out={tmp_path / 'wrong'}"]))
    more = ["algo.steps=16", "algo.max_tokens=1", "algo.group_size=6", "algo.kl_coef=0"]
    more += [f"reward={folder}", "algo.refresh_lr=2e-2", "algo.refresh_replay=0"]
    more += ["algo.lr=5e-3", "hardware.save_every=null", "seed=5"]
    refreshed = untimed(run(tmp_path / "refreshed", *more))
    never = untimed(run(tmp_path / "never", *more, "algo.refresh_reward=100"))
    before, after = (refreshed[1][f"refresh/accuracy{when}"] for when in ("_before", ""))
    assert after > max(before, 0.5)
    assert refreshed[0]["judge"] == never[0]["judge"]  # 0.3
    assert never[-1]["judge"] < 0.2 and refreshed[-1]["judge"] > 0.8


# --------------------------------------------------------------------------- replay


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_old_pairs_are_the_asked_for_share(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First from the preference rows, then from earlier refreshes as well; each at most once."""
    fitted: list[list[Answers]] = []
    known: list[list[Answers]] = []
    fit = RewardRefresh._fit

    def spy(refresh: RewardRefresh, pairs: list[Answers], step: int) -> float:
        fitted.append(pairs)
        known.append(refresh._known)
        return fit(refresh, pairs, step)

    monkeypatch.setattr(RewardRefresh, "_fit", spy)
    out = run(tmp_path / "out", f"algo.refresh_replay={share}")
    log = untimed(out)
    for i, step in enumerate((2, 4, 6)):
        new = pairs_of(out, [step - 1, step])
        old = pairs_of(out, range(1, step - 1)) + known[i]
        count = log[step - 1]["refresh/replayed"]
        assert count == round(len(new) * share / (1 - share)) <= len(old)
        assert count / (len(new) + count) == pytest.approx(share, abs=0.06)
        assert fitted[i][: len(new)] == new
        replayed = fitted[i][len(new) :]
        assert len(replayed) == count and all(pair in old for pair in replayed)
        if i == 0:
            assert all(pair in known[i] for pair in replayed)
    assert bool(known[0]) == (share > 0)


def test_data_without_preferences_has_no_history_at_first(tmp_path: Path) -> None:
    few = "".join(json.dumps({"prompt": f"Greet {n}: "}) + "\n" for n in "ABCDEFGHIJKLMNOP")
    (tmp_path / "prompts.jsonl").write_text(few)
    log = untimed(run(tmp_path / "out", f"data.path={tmp_path / 'prompts.jsonl'}"))
    assert log[1]["refresh/replayed"] == 0 < log[1]["refresh/pairs"]
    assert log[3]["refresh/replayed"] > 0


def test_without_pairs_the_reward_model_stays(tmp_path: Path) -> None:
    """A judge to whom all is equal teaches nothing."""
    out = run(tmp_path / "out", "judge=regex:.?")
    log = untimed(out)
    assert log[1]["refresh/pairs"] == 0 and "refresh/loss" not in log[1]
    assert not (out / "reward").exists()


# --------------------------------------------------------------------------- resume, hardware


def contents(out: Path) -> dict[str, bytes]:
    """All files that say what was learnt."""
    kinds = ("*.safetensors", "pairs.jsonl", "samples.jsonl", "reward/stage.json")
    return {
        str(file.relative_to(out)): file.read_bytes() for kind in kinds for file in out.rglob(kind)
    }


@pytest.mark.parametrize(("saved", "killed_at"), [(3, 4), (5, 6)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    kind: str, saved: int, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From just after a refresh, and from between two of them, some of their pairs known."""
    words = [*KINDS[kind], "algo.refresh_reward=3", f"hardware.save_every={saved}"]
    whole = run(tmp_path / "whole", *words)
    out = tmp_path / "killed"
    write = JsonLines.write

    def dying(log: JsonLines, number: int, values: dict[str, Any]) -> None:
        write(log, number, values)
        if number == killed_at and log.file.name == "metrics.jsonl":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", dying)
        with pytest.raises(Killed):
            run(out, *words)
    assert not (out / "reward").exists()
    assert lines(out / "pairs.jsonl")[-1]["step"] == killed_at  # which the run will see again
    run(out, *words)
    assert "reward/stage.json" in contents(whole)
    assert contents(out) == contents(whole)
    assert untimed(out) == untimed(whole)


def test_a_run_killed_while_it_writes_its_model_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model is there already, and is written once more."""
    every = "hardware.save_every=1"
    whole = run(tmp_path / "whole", every)

    def dying(session: Session, *args: Any, **more: Any) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish_model", dying)
        with pytest.raises(Killed):
            run(tmp_path / "killed", every)
    assert (tmp_path / "killed" / "reward").is_dir()
    assert contents(run(tmp_path / "killed", every)) == contents(whole)


def test_hardware_changes_no_metric(tmp_path: Path) -> None:
    seed = "seed=2"  # of seed 0 one of 24 responses of step 6 differs from a token on
    one = untimed(run(tmp_path / "one", seed))
    small = ["hardware.tokens_per_microbatch=48", "hardware.gradient_checkpointing=true"]
    more = [*small, "hardware.share_prompts=false", "hardware.save_every=null"]
    other = untimed(run(tmp_path / "other", *more, seed))
    for entry, again in zip(one, other, strict=True):
        assert again == pytest.approx(entry, rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["judge=null"], "algo.refresh_reward=2 needs judge=VALUE: What labels"),
        (
            ["algo.refresh_batch_size=null"],
            "algo.refresh_reward=2 needs algo.refresh_batch_size; algo=grpo_i",
        ),
        (
            NEVER,
            "judge is not used by algo.refresh_reward=null; set it to null, or take algo=grpo_",
        ),
        (
            [*NEVER[:-1], "judge=null"],
            "algo.refresh_replay is not used by algo.refresh_reward=null",
        ),
        (["algo.refresh_replay=1"], "algo.refresh_replay must be"),
        (["algo.keep=reward"], "algo.keep=reward compares rewards that algo.refresh_reward"),
        (["algo.target_reward=3"], "algo.target_reward compares rewards"),
        (["algo=reinforce_pp", "algo.group_size=1"], "pairs within a group"),
        (["reward=length:3"], "reward=length:3 has none; give one"),
        ([f"reward={REWARD} + {ADAPTER}"], f"has 2 ({REWARD}, {ADAPTER})"),
        ([f"reward=0*{REWARD} + length:3"], "has none"),
        ([f"judge=./{REWARD}"], f"would teach {REWARD} what it says already"),
        (["judge=runs/demo/nothing"], "judge=runs/demo/nothing does not exist"),
    ],
)
def test_what_cannot_be_refreshed_is_said(words: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        preflight(config(tmp_path / "out", *words))
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_judge_that_is_a_model_is_a_parent(tmp_path: Path) -> None:
    """Another one than that which learns; what the judge reads is checked as the reward's is."""
    out = run(tmp_path / "out", f"judge={ADAPTER}", "algo.steps=2")
    found = json.loads((out / "stage.json").read_text())
    assert found["parents"]["judge"]["path"] == ADAPTER
    assert {"reward_accuracy", "judge_accuracy"} <= set(found["checks"])


def test_a_judge_needs_its_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exact_answer needs a column 'answer'"):
        run(tmp_path / "out", "judge=exact_answer")
    assert not (tmp_path / "out").exists()
