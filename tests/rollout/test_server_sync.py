"""The ways of weights to vLLM servers: several of them, from GPU to GPU, and adapters alone."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.models.save import save_working, working_weights
from rlhf_cli.models.score import logprobs_of
from rlhf_cli.rollout import server_nccl, server_process
from rlhf_cli.rollout.native import NativeEngine
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.server import ServerEngine
from rlhf_cli.rollout.server_nccl import NcclSync
from tests import toys
from tests.rollout.test_server import (
    PROMPTS,
    SYNC,
    drawn,
    encoder_of,
    engine_of,
    fields,
    llama,
    moved,
)
from tests.rollout.test_server import no_pauses as no_pauses
from tests.toys import bpe, hardware_of
from tests.vllm_stub import Stub, gloo, listening

GREEDY = Sampling(6, temperature=0.0)


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture
def stubs(model: Any, tmp_path: Path) -> list[Stub]:
    """Two, each started with other weights than the model's."""
    for name in ("a", "b"):
        moved(model, 0.5, seed=ord(name)).save_pretrained(tmp_path / name)
    return [Stub(tmp_path / name) for name in ("a", "b")]


@pytest.fixture
def urls(stubs: list[Stub]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(listening(stub)) for stub in stubs]


# --------------------------------------------------------------------------- several servers


def test_prompts_are_dealt_and_all_servers_have_the_weights(
    model: Any, stubs: list[Stub], urls: list[str], tmp_path: Path
) -> None:
    native = NativeEngine(model, encoder_of(), hardware_of())
    engine = engine_of(model, urls, tmp_path / "w")
    assert fields(drawn(engine, GREEDY)) == fields(drawn(native, GREEDY))
    own = [[body["prompt"] for body in stub.requests] for stub in stubs]
    assert {*map(tuple, own[0])} == {tuple(PROMPTS[i][1]) for i in (0, 2)} and len(own[0]) == 6
    assert {*map(tuple, own[1])} == {tuple(PROMPTS[i][1]) for i in (1, 3)} and len(own[1]) == 6
    assert stubs[0].label == stubs[1].label
    for stub in stubs:
        assert [each for each in stub.routes if each in SYNC][: len(SYNC)] == SYNC
    stubs[1].deaf = True
    engine.update(moved(model))
    with pytest.raises(RunError, match=f"{urls[1]} does not run the weights of version 2"):
        drawn(engine)


def test_only_the_share_of_a_server_that_was_started_anew_is_asked_again(
    model: Any, stubs: list[Stub], urls: list[str], tmp_path: Path
) -> None:
    expected = fields(drawn(engine_of(model, urls, tmp_path / "w")))
    for stub in stubs:
        stub.asked.clear()
    stubs[1].faults = {"/v1/completions": [*[None] * 4, "restart"]}
    engine = engine_of(model, urls, tmp_path / "w")
    assert fields(drawn(engine)) == expected
    assert [len(stub.requests) for stub in stubs] == [6 + 3, 6 + 1 + 3], "the six are dealt anew"


def test_one_that_fails_ends_what_is_asked_of_the_others(
    model: Any, stubs: list[Stub], urls: list[str], tmp_path: Path
) -> None:
    stubs[0].faults, stubs[0].hangs = {"/v1/completions": [None, None, *["hang"] * 9]}, 20.0
    stubs[1].faults = {"/v1/completions": [None, None, 400]}
    engine = engine_of(model, urls, tmp_path / "w", rollout_timeout=60.0)
    with pytest.raises(RunError, match=f"{urls[1]}/v1/completions answered 400"):
        drawn(engine)


# --------------------------------------------------------------------------- from GPU to GPU


class Gloo:
    """What stands for NCCL here."""

    seconds = 10.0

    def __init__(self, host: str, port: int, size: int, device: torch.device) -> None:
        self._group: Any = gloo(host, port, 0, size, self.seconds)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._group.broadcast(tensor.contiguous(), 0).wait()

    def wait(self) -> None:
        return


@pytest.fixture
def by_gloo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(NcclSync, "group_of", Gloo)
    yield
    for thread in threading.enumerate():  # what waits for a worker that does not come
        if thread.name == "nccl":
            thread.join(10)


NCCL = [
    "/pause?mode=wait",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/reset_prefix_cache",
    "/resume",
    "/weight_info",
]


@pytest.mark.usefixtures("by_gloo")
def test_tensors_are_broadcast_to_the_workers_of_all_servers(
    model: Any, stubs: list[Stub], urls: list[str], tmp_path: Path
) -> None:
    """Names, types, shapes and order are told before, and are those of the files."""
    stubs[0].workers = 2  # by tensor parallelism
    save_working(model, tmp_path / "files", torch.float32)
    files = load_file(tmp_path / "files" / "model.safetensors")
    engine = engine_of(model, urls, tmp_path / "w", rollout_sync="nccl")
    for policy in (model, moved(model)):
        for stub in stubs:
            stub.asked.clear()
        engine.update(policy)
        rollouts = drawn(engine)
        own = logprobs_of(policy, [each.tokens for each in rollouts], hardware_of())
        for each, expected in zip(rollouts, own, strict=True):
            torch.testing.assert_close(torch.tensor(each.logprobs), expected, atol=1e-4, rtol=0)
        for stub in stubs:
            asked = [each for each in stub.routes if each in NCCL]
            assert [each for each in asked if each != "/weight_info"] == NCCL[:-1]
            assert asked[-1] == "/weight_info" and {*stub.received} == {*files}
            assert "/collective_rpc" not in stub.routes
    told = [body for _, body in stubs[1].asked if body and "update_info" in body]
    shapes = {name: list(value.shape) for name, value in files.items()}
    info = told[0]["update_info"]
    assert dict(zip(info["names"], info["shapes"], strict=True)) == shapes
    assert {*info["dtype_names"]} == {"float32"}
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


@pytest.mark.usefixtures("by_gloo")
def test_a_server_started_anew_joins_a_new_group(
    model: Any, stubs: list[Stub], urls: list[str], tmp_path: Path
) -> None:
    expected = fields(drawn(engine_of(model, urls, tmp_path / "w")))
    engine = engine_of(model, urls, tmp_path / "w", rollout_sync="nccl")
    assert fields(drawn(engine)) == expected
    stubs[1].restart()
    assert fields(drawn(engine)) == expected
    joined = [body["init_info"] for path, body in stubs[1].asked if path.startswith("/init_")]
    assert len(joined) == 2 and {each["rank_offset"] for each in joined} == {2}
    assert len({each["master_port"] for each in joined}) == 2
    assert [path for path, _ in stubs[0].asked].count("/init_weight_transfer_engine") == 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"/init_weight_transfer_engine": [500]}, "/init_weight_transfer_engine answered 500"),
        ({"/update_weights": [500]}, "/update_weights answered 500: fault 500; it may stay paused"),
        ({"/finish_weight_update": ["hang"] * 9}, "has not answered within 2 s"),
    ],
)
@pytest.mark.usefixtures("by_gloo")
def test_what_fails_between_gpus_is_one_line(
    faults: dict[str, Any],
    message: str,
    model: Any,
    stubs: list[Stub],
    urls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL waits forever for a worker that does not come; a run does not."""
    stubs[0].faults, stubs[0].hangs = faults, 3.0
    monkeypatch.setattr(Gloo, "seconds", 1.0)
    seconds = 2.0 if "hang" in str(faults) else 20.0
    words: dict[str, Any] = {"rollout_sync": "nccl", "rollout_timeout": seconds}
    engine = engine_of(model, urls[0], tmp_path / "w", **words)
    with pytest.raises(RunError, match=message) as caught:
        drawn(engine)
    assert "by NCCL" in str(caught.value) and "\n" not in str(caught.value)


def test_what_fails_here_is_told_at_once(
    model: Any, urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where this Python's vLLM cannot be loaded."""

    def broken(*args: object) -> Any:
        raise ImportError("libnccl.so.2: cannot open shared object file")

    monkeypatch.setattr(NcclSync, "group_of", broken)
    engine = engine_of(model, urls[0], tmp_path / "w", rollout_sync="nccl")
    with pytest.raises(RunError, match=r"by NCCL: ImportError: libnccl\.so\.2"):
        drawn(engine)


def test_nccl_needs_vllm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"needs vllm>=0\.30 on this side as well, and none is"):
        server_process.check_installed()
    monkeypatch.setattr(server_process, "version", lambda name: "0.29.1")
    with pytest.raises(UserError, match=r"and 0\.29\.1 is installed"):
        server_process.check_installed()


def test_the_address_is_the_one_that_servers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_nccl._address_towards("http://127.0.0.1:8000") == "127.0.0.1"
    seen = {"http://127.0.0.1:1": "127.0.0.1", "http://far:2": "10.0.0.7"}
    monkeypatch.setattr(server_nccl, "_address_towards", seen.__getitem__)
    servers: Any = [type("Server", (), {"url": url}) for url in seen]
    assert server_nccl._own_address(servers) == "10.0.0.7"
    assert server_nccl._own_address(servers[:1]) == "127.0.0.1"
    with socket.socket() as own:
        own.bind(("", server_nccl._free_port()))


def test_working_weights_are_those_of_the_file(tmp_path: Path) -> None:
    """Of a model with tied embeddings, and with an adapter, rounded."""
    tied = toys.llama(90, num_hidden_layers=1, tie_word_embeddings=True)
    adapted: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    for name, model in (("tied", tied), ("adapted", adapted)):
        save_working(model, tmp_path / name, torch.bfloat16)
        files = load_file(tmp_path / name / "model.safetensors")
        weights = working_weights(model, torch.bfloat16)
        assert {*weights} == {*files}
        assert all(torch.equal(weights[each], files[each]) for each in files)


# --------------------------------------------------------------------------- adapters alone


def adapted_of(folder: Path, seed: int = 1, **options: Any) -> Any:
    """A base that a folder holds, with an adapter that changes it."""
    if not folder.exists():
        llama().save_pretrained(folder)
    base: Any = type(llama()).from_pretrained(folder)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)
    adapted: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    return adapted.eval()


@pytest.fixture
def base(tmp_path: Path) -> Iterator[tuple[Stub, str, Path]]:
    folder = tmp_path / "base"
    adapted_of(folder)
    stub = Stub(folder)
    with listening(stub) as url:
        yield stub, url, folder


def with_tokenizer(engine: ServerEngine) -> ServerEngine:
    engine._encoder.tokenizer = bpe()
    return engine


def test_an_adapter_is_swapped_and_the_base_stays(
    base: tuple[Stub, str, Path], tmp_path: Path
) -> None:
    """Each version under its own name; the last one is unloaded, and its folder removed."""
    stub, url, folder = base
    policy = adapted_of(folder)
    engine = with_tokenizer(engine_of(policy, url, tmp_path / "w", rollout_sync="adapter"))
    before, names = stub.model, []
    for seed in (1, 2):
        policy = adapted_of(folder, seed)
        engine.update(policy)
        rollouts = drawn(engine)
        own = logprobs_of(policy, [each.tokens for each in rollouts], hardware_of())
        for each, expected in zip(rollouts, own, strict=True):
            torch.testing.assert_close(torch.tensor(each.logprobs), expected, atol=1e-4, rtol=0)
        names.append(stub.requests[-1]["model"])
    assert [*stub.adapters] == names[1:] and names[0] < names[1] and stub.model is before
    assert [each.name for each in (tmp_path / "w").iterdir()] == names[1:]
    assert not {*stub.routes} & {"/pause?mode=wait", "/collective_rpc", "/update_weight_version"}
    stub.restart()
    again = drawn(engine)
    assert fields(again) == fields(rollouts)


def test_a_wrong_base_and_a_deaf_server_are_found_out(
    base: tuple[Stub, str, Path], tmp_path: Path
) -> None:
    stub, url, folder = base
    engine = with_tokenizer(
        engine_of(adapted_of(folder), url, tmp_path / "w", rollout_sync="adapter")
    )
    drawn(engine)
    stub.deaf = True
    engine.update(adapted_of(folder, 2))
    with pytest.raises(RunError, match="does not run the weights of version 2"):
        drawn(engine)
    stub.dev = False
    with pytest.raises(RunError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        drawn(
            with_tokenizer(
                engine_of(adapted_of(folder), url, tmp_path / "w", rollout_sync="adapter")
            )
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "has use_dora, which vLLM does not take"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save, which vLLM does not take"),
        ({"init_lora_weights": "pissa"}, "stands on a base that no folder holds"),
        (None, "the policy has no adapter"),
    ],
)
def test_adapters_that_vllm_does_not_take(
    options: dict[str, Any] | None, said: str, base: tuple[Stub, str, Path], tmp_path: Path
) -> None:
    _, url, folder = base
    policy = llama() if options is None else adapted_of(folder, **options)
    engine = with_tokenizer(engine_of(policy, url, tmp_path / "w", rollout_sync="adapter"))
    with pytest.raises(RunError, match=f"rollout_sync=adapter: .*{said}.*; set .*files"):
        drawn(engine)
