"""Sampling from a vLLM server: what is asked, in which order weights go, and what is found out."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_cli.config.errors import RunError
from rlhf_cli.data.kinds import Prompt
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout import server_client, server_sync
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server import ServerEngine
from tests import toys
from tests.ranks import on_ranks
from tests.toys import hardware_of
from tests.vllm_stub import Stub, listening

STOPS = [2, 3]
PROMPTS = [(Prompt("p"), ids) for ids in ([7, 30, 31], [8], [9, *range(40, 70)], [11, 12])]
SYNC = [
    "/pause?mode=wait",
    "/collective_rpc",
    "/update_weight_version",
    "/reset_prefix_cache",
    "/resume",
    "/weight_info",
]


def llama() -> Any:
    return toys.llama(90, num_hidden_layers=1)


def encoder_of(size: int = 90) -> Any:
    known = {str(id): id for id in range(size)}
    return SimpleNamespace(
        stop_ids=STOPS,
        text=lambda ids: " ".join(map(str, ids)),
        tokenizer=SimpleNamespace(get_vocab=lambda: known),
    )


def engine_of(
    model: Any, url: str | list[str], folder: Path, changes: bool = True, **more: Any
) -> ServerEngine:
    hardware = hardware_of(
        rollout="vllm", rollout_server=url, packing="false", **{"rollout_timeout": 20.0, **more}
    )
    return ServerEngine(model, encoder_of(), hardware, folder, changes)


def moved(model: Any, by: float = 0.05, seed: int = 5) -> Any:
    """A copy with other weights, as after some updates."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += by * torch.randn_like(weight)
    return other


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture
def stub(model: Any, tmp_path: Path) -> Stub:
    """It was started with other weights than the model's."""
    moved(model, 0.5, seed=9).save_pretrained(tmp_path / "served")
    return Stub(tmp_path / "served")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_sync, "PAUSE", 0.01)


@pytest.fixture
def url(stub: Stub) -> Iterator[str]:
    with listening(stub) as address:
        yield address


def drawn(engine: Any, sampling: Sampling | None = None, **more: Any) -> list[Rollout]:
    return list(
        engine.sample(PROMPTS, sampling or Sampling(6), **{"samples": 3, "seed": 3, **more})
    )


def fields(rollouts: list[Rollout]) -> list[Any]:
    return [(each.tokens, each.finish_reason, each.text) for each in rollouts]


# --------------------------------------------------------------------------- samples


def test_greedy_text_is_that_of_this_process(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    engine, greedy = engine_of(model, url, tmp_path / "w"), Sampling(6, temperature=0.0)
    native = NativeEngine(model, encoder_of(), hardware_of())
    assert fields(drawn(engine, greedy)) == fields(drawn(native, greedy))
    assert not engine.exact and engine.foreign


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_training(
    temperature: float, model: Any, url: str, tmp_path: Path
) -> None:
    rollouts = drawn(engine_of(model, url, tmp_path / "w"), Sampling(6, temperature))
    assert len({tuple(each.tokens.response) for each in rollouts}) > 6
    own = logprobs_of(model, [each.tokens for each in rollouts], hardware_of(), temperature)
    for each, expected in zip(rollouts, own, strict=True):
        torch.testing.assert_close(torch.tensor(each.logprobs), expected, atol=1e-4, rtol=0)
        assert (each.tokens.response[-1] in STOPS) == (each.finish_reason == "eos")


def test_a_rerun_asks_the_same_and_places_decide(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """Seeds are of the place among all and the sample, whatever is asked beside it."""
    whole = drawn(engine_of(model, url, tmp_path / "w"))
    assert fields(drawn(engine_of(model, url, tmp_path / "w"))) == fields(whole)
    last = engine_of(model, url, tmp_path / "w").sample(
        PROMPTS[2:], Sampling(6), samples=3, first=2, seed=3
    )
    assert fields(last) == fields(whole)[6:]
    assert fields(drawn(engine_of(model, url, tmp_path / "w"), seed=4)) != fields(whole)
    seeds = [body["seed"] for body in stub.requests[:12]]
    assert len({*seeds}) == 12 and all(0 <= seed < 2**63 for seed in seeds)


def test_every_option_is_said(model: Any, stub: Stub, url: str, tmp_path: Path) -> None:
    """What is left out, a generation_config.json of the served model would fill in."""
    options: dict[str, Any] = {"top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 2}
    sampling = Sampling(6, 0.7, **options)
    encoder = encoder_of(88)  # the last two rows stand for no token
    hardware = hardware_of(rollout="vllm", rollout_server=url)
    engine = ServerEngine(model, encoder, hardware, tmp_path / "w", True)
    rollouts = drawn(engine, sampling, samples=9)
    body = stub.requests[0]
    assert {name: body[name] for name in options} == options
    assert (body["temperature"], body["max_tokens"], body["min_p"]) == (0.7, 6, 0.0)
    assert body["stop"] == [] and body["stop_token_ids"] == STOPS and body["ignore_eos"]
    assert body["logit_bias"] == {"88": -100.0, "89": -100.0}
    assert {name: body[name] for name in ("presence_penalty", "frequency_penalty", "n")} == {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
    }
    assert all(len(each.tokens.response) >= 2 for each in rollouts)


def test_a_stop_string_ends_where_it_comes_up(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    stub.text_of = encoder_of().text
    engine = engine_of(model, url, tmp_path / "w")
    free = drawn(engine)
    string = str(free[0].tokens.response[1])
    rollouts = drawn(engine, Sampling(6, stop=(string,)))
    assert rollouts[0].finish_reason == "stop" and string not in rollouts[0].text
    assert rollouts[0].tokens.response == free[0].tokens.response[:2]
    stub.text_of = lambda ids: string  # as another tokenizer reads them
    with pytest.raises(RunError, match="by another tokenizer"):
        drawn(engine, Sampling(6, stop=(string,)))


def test_responses_are_kept_and_not_asked_again(
    model: Any, stub: Stub, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_cli.rollout.server.AT_ONCE", 3)
    made: dict[int, list[Rollout]] = {}
    told: list[int] = []
    kept: Any = SimpleNamespace(done={}, keep=made.update)
    whole = drawn(engine_of(model, url, tmp_path / "w"), kept=kept, advance=told.append)
    assert sorted(made) == [0, 1, 2, 3] and sum(told) == 12
    asked = len(stub.requests)
    kept = SimpleNamespace(done={i: made[i] for i in (0, 2)}, keep=made.update)
    again = drawn(engine_of(model, url, tmp_path / "w"), kept=kept)
    assert fields(again) == fields(whole) and len(stub.requests) == asked + 6


# --------------------------------------------------------------------------- weights


def test_weights_go_in_order_and_each_version_has_its_label(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    (tmp_path / "w" / "v00000007").mkdir(parents=True)  # of a part that was killed
    engine, labels = engine_of(model, url, tmp_path / "w"), []
    for policy in (model, moved(model), moved(model, 0.1)):
        stub.asked.clear()
        engine.update(policy)
        rollouts = drawn(engine)
        assert [each for each in stub.routes if each in SYNC][: len(SYNC)] == SYNC
        labels.append(stub.label)
        assert {body["cache_salt"] for body in stub.requests} == {stub.label}
        own = logprobs_of(policy, [each.tokens for each in rollouts], hardware_of())
        torch.testing.assert_close(torch.tensor(rollouts[0].logprobs), own[0], atol=1e-4, rtol=0)
    assert len({*labels}) == 3 and labels == sorted(labels)
    assert not list((tmp_path / "w").iterdir()), "old weights are removed"
    stub.asked.clear()
    drawn(engine)  # nothing was updated
    assert not {*SYNC[:-1]} & {*stub.routes}


def test_an_adapter_is_merged_and_the_policy_stays(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    settings = model.generation_config
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    engine, greedy = engine_of(adapted, url, tmp_path / "w"), Sampling(6, temperature=0.0)
    native = NativeEngine(adapted, encoder_of(), hardware_of())
    assert fields(drawn(engine, greedy)) == fields(drawn(native, greedy))
    assert model.generation_config is settings
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_a_server_that_does_not_load_is_found_out(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    stub.deaf = True
    with pytest.raises(RunError, match=r"version 1, which it was given: its log-probs differ"):
        drawn(engine_of(model, url, tmp_path / "w"))


def test_one_that_stops_loading_is_found_out_by_how_scores_move(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """An update so small that old weights still score about the same."""
    engine = engine_of(model, url, tmp_path / "w")
    drawn(engine)
    stub.deaf = True
    engine.update(moved(model, 0.002))
    with pytest.raises(RunError, match=r"version 2, .* moved by 0% .*: it runs those before"):
        drawn(engine)


def test_a_stale_prefix_cache_is_found_out(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    engine = engine_of(model, url, tmp_path / "w")
    drawn(engine)
    stub.sticky = True
    engine.update(moved(model, 0.2))
    drawn(engine)  # the salt of the new weights: not yet in the cache without salts
    engine.update(moved(model, 0.4, seed=6))
    with pytest.raises(RunError, match="prefix cache"):
        drawn(engine)


def test_log_probs_before_temperature_are_found_out(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    stub.raw = True
    with pytest.raises(RunError, match="--logprobs-mode processed_logprobs"):
        drawn(engine_of(model, url, tmp_path / "w"))


def test_a_plain_server_must_serve_the_policy(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """generate and evaluate change nothing; such a server needs no development mode."""
    stub.dev = False
    with pytest.raises(RunError, match="does not serve this policy: .*vllm serve POLICY"):
        drawn(engine_of(model, url, tmp_path / "w", changes=False))
    model.save_pretrained(stub.folder)
    stub.restart()
    drawn(engine_of(model, url, tmp_path / "w", changes=False))
    assert not {*SYNC} & {*stub.routes} and not (tmp_path / "w").exists()


# --------------------------------------------------------------------------- faults


def test_what_passes_is_asked_again(model: Any, stub: Stub, url: str, tmp_path: Path) -> None:
    expected = fields(drawn(engine_of(model, url, tmp_path / "w")))
    stub.faults = {
        "/v1/completions": [None, None, 500, "drop", 503, None, "drop"],
        "/collective_rpc": [500],
        "/health": ["drop"],
    }
    stub.held = 2
    assert fields(drawn(engine_of(model, url, tmp_path / "w"))) == expected


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"/v1/completions": [None, None, 400]}, "/v1/completions answered 400: fault 400"),
        ({"/v1/completions": [None, None, *[500] * 60]}, "/v1/completions answered 500"),
        ({"/v1/completions": [None, None, *["hang"] * 12]}, "has not answered within 1 s"),
        (
            {"/collective_rpc": [500] * 3},
            "weights in .*-00000001, .* were not loaded: .* stay paused",
        ),
        ({"/pause": [404]}, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_what_does_not_pass_is_one_line(
    faults: dict[str, Any], message: str, model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """A response that fails is an error, and never one less."""
    stub.faults = faults
    timeout = 1.0 if "hang" in str(faults) else 20.0
    engine = engine_of(model, url, tmp_path / "w", rollout_timeout=timeout)
    with pytest.raises(RunError, match=message) as caught:
        drawn(engine)
    assert "\n" not in str(caught.value)


def test_others_are_given_up_with_the_first_that_fails(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """A run does not wait for what it will not use."""
    stub.faults = {"/v1/completions": [None, None, *["hang"] * 11, 400]}
    stub.hangs = 60.0
    engine = engine_of(model, url, tmp_path / "w", rollout_timeout=60.0)
    began = time.monotonic()
    with pytest.raises(RunError, match="fault 400"):
        drawn(engine)
    assert time.monotonic() - began < 30


def test_a_server_started_anew_gets_the_weights_again(
    model: Any, stub: Stub, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fields(drawn(engine_of(model, url, tmp_path / "w")))
    engine = engine_of(model, url, tmp_path / "w")
    stub.faults = {"/v1/completions": [*[None] * 7, "restart"]}
    assert fields(drawn(engine)) == expected
    assert "lost the weights of this run while it sampled" in capsys.readouterr().err
    stub.restart()  # between two batches
    assert fields(drawn(engine)) == expected


def test_nobody_there(model: Any, tmp_path: Path) -> None:
    engine = engine_of(model, "http://127.0.0.1:9", tmp_path / "w", rollout_timeout=0.3)
    said = "127.0.0.1:9/health cannot be reached: .*; hardware.rollout_timeout=0.3 is over"
    with pytest.raises(RunError, match=said):
        drawn(engine)


def test_an_old_server_is_named(model: Any, stub: Stub, url: str, tmp_path: Path) -> None:
    stub.version = "0.22.1"
    with pytest.raises(RunError, match=r"is vLLM 0\.22\.1, and vllm>=0\.30 is needed"):
        drawn(engine_of(model, url, tmp_path / "w"))


def test_what_is_no_vllm_server_is_told(
    model: Any, stub: Stub, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [{}, [], "0.30", {"version": "0.30.1", "data": []}]
    for answer in answers:
        monkeypatch.setattr(
            server_client.Client, "get", lambda client, route, answer=answer: answer
        )
        with pytest.raises(RunError, match=r"127.* says no version or no model: is it a vLLM"):
            drawn(engine_of(model, url, tmp_path / "w"))


def test_prompts_must_fit(model: Any, stub: Stub, url: str, tmp_path: Path) -> None:
    stub.longest = 36
    with pytest.raises(RunError, match="takes 36 tokens .* --max-model-len 37"):
        drawn(engine_of(model, url, tmp_path / "w"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finish_reason": "stop", "stop_reason": 5}, "ended at id .*, and only"),
        ({"logprobs": {"token_logprobs": [0.0]}}, "has 1 log-probs for"),
        ({"token_ids": None}, "lacks what vLLM 0.30 answers"),
        ({"finish_reason": "abort"}, "ended a request with abort, 5 times"),
    ],
)
def test_a_wrong_answer_is_refused(
    changed: dict[str, Any],
    message: str,
    model: Any,
    stub: Stub,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_it_is = stub.completion

    def wrong(body: dict[str, Any]) -> dict[str, Any]:
        answer = as_it_is(body)
        if body.get("stop_token_ids"):
            answer["choices"][0] |= changed
        return answer

    monkeypatch.setattr(stub, "completion", wrong)
    with pytest.raises(RunError, match=message):
        drawn(engine_of(model, url, tmp_path / "w"), Sampling(4))


def test_a_key_comes_from_the_environment(
    model: Any, stub: Stub, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    from http.client import HTTPConnection

    as_it_is = HTTPConnection.request

    def request(self: Any, method: str, route: str, content: Any, headers: Any) -> None:
        seen.append(headers.get("Authorization"))
        as_it_is(self, method, route, content, headers)

    monkeypatch.setattr(HTTPConnection, "request", request)
    client = server_client.Client(url, 5.0)
    client.get("/health")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    client.get("/health")
    assert seen == [None, "Bearer s3cret"]


# --------------------------------------------------------------------------- ranks


def on_a_rank(url: str, folder: str) -> list[Any]:
    from rlhf_cli.ranks.world import world

    model = llama()
    engine = engine_of(model, url, Path(folder))
    rollouts = drawn(engine)
    engine.update(moved(model))
    return [world().rank, fields(rollouts), fields(drawn(engine))]


def failing_on_a_rank(url: str, folder: str) -> str:
    try:
        on_a_rank(url, folder)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_rank_0_asks_and_all_have_the_responses(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    alone = fields(drawn(engine_of(model, url, tmp_path / "w")))
    stub.asked.clear()
    first, second = on_ranks(2, on_a_rank, url, str(tmp_path / "w"))
    assert first[1:] == second[1:] and first[1] == alone
    assert len(stub.requests) == 24 and stub.routes.count("/collective_rpc") == 2
    stub.faults = {"/v1/completions": [None, None, 400]}
    told = on_ranks(2, failing_on_a_rank, url, str(tmp_path / "w"))
    assert told[0] == told[1] and "fault 400" in told[0]


def test_tokens_of_the_probe_are_the_runs_own(
    model: Any, stub: Stub, url: str, tmp_path: Path
) -> None:
    """First prompts joined, as far as model and server have room."""
    drawn(engine_of(model, url, tmp_path / "w"))
    joined = [id for _, ids in PROMPTS for id in ids]
    probes = [body for _, body in stub.asked if body and body.get("prompt_logprobs")]
    assert probes[0]["prompt"][:30] == joined[:30]
