"""A server with the routes of vLLM 0.30 that hardware.rollout=vllm asks; a tiny model behind it.

What vLLM's workers do by NCCL is done by gloo, a thread for each of them.

Answers have the fields that vLLM documents, and no others. It keeps the keys and values of whole
prompts, so that a prompt asked again after other weights are loaded is answered with old ones,
unless the cache was reset. What it does wrong is said by its attributes.
"""

import copy
import json
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


class Text(str):
    """An answer that is no JSON."""


_LOADING = threading.Lock()  # transformers loads one model at a time in a process


def loaded(folder: Path | str) -> Any:
    """The model of a folder, and what was found wrong with it."""
    with _LOADING:
        found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return found[0].eval(), found[1]


def gloo(host: str, port: int, rank: int, size: int, seconds: float = 10.0) -> Any:
    """A group that NCCL's stands for, of this process or thread."""
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(host, port, None, rank == 0, limit, False)  # type: ignore[attr-defined]
    return dist.ProcessGroupGloo(store, rank, size, limit)


class Stub:
    """What the server serves and was asked for.

    faults: route -> what the next requests for it meet: a status, `hang`, `drop` or `restart`.
    version: that it says it is; None: as plain servers, which cannot be given weights.
    deaf: it says that it has loaded weights, and has not.
    sticky: its cache is never reset, and it knows no salt.
    raw: log-probs are those before temperature.
    workers: processes that its model is spread over.
    adapters: by name, as `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 allow them.
    """

    def __init__(self, folder: Path, longest: int = 128) -> None:
        self.folder, self.longest = folder, longest
        self.version: str | None = "0.30.1"
        self.faults: dict[str, list[Any]] = {}
        self.deaf = self.sticky = self.raw = False
        self.dev = True
        self.hangs = 1.5  # seconds
        self.held = 0  # resets that find blocks still held
        self.workers = 1
        self.received: list[str] = []  # names of the tensors of the newest update, in order
        self.asked: list[tuple[str, Any]] = []
        self.text_of: Any = lambda ids: " ".join(map(str, ids))
        self._guard = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Serve the folder that it was started with, as if nothing had been."""
        self.model, _ = loaded(self.folder)
        self.label, self.paused = "default", False
        self.cache: dict[Any, Any] = {}
        self.adapters: dict[str, Any] = {}
        self.groups: list[Any] = []  # of each worker, with the trainer
        self.update: dict[str, torch.Tensor] | None = None

    @property
    def routes(self) -> list[str]:
        """All that were asked but for completions, in order."""
        return [route for route, _ in self.asked if route != "/v1/completions"]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Requests for completions that are rollouts: no probe has stop ids."""
        found = [body for route, body in self.asked if route == "/v1/completions"]
        return [body for body in found if body.get("stop_token_ids")]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and content."""
        route = urlsplit(path).path
        with self._guard:
            self.asked.append((path, body))
            fault = self.faults.get(route, []) and self.faults[route].pop(0)
        if fault == "hang":
            time.sleep(self.hangs)
        elif fault == "drop":
            raise ConnectionError
        elif fault == "restart":
            with self._guard:
                self.restart()
            raise ConnectionError
        elif fault:
            return int(fault), {"error": {"message": f"fault {fault}", "code": int(fault)}}
        if route == "/_started":  # by the program below
            self.folder = Path(body["model"])
            self.restart()
            return 200, None
        plain = {
            ("GET", "/health"): lambda: None,
            ("GET", "/version"): lambda: {"version": self.version},
            ("GET", "/v1/models"): lambda: {
                "object": "list",
                "data": [
                    {"id": "policy", "max_model_len": self.longest},
                    *({"id": name, "max_model_len": None} for name in self.adapters),
                ],
            },
            ("POST", "/v1/completions"): lambda: self.completion(body),
        }
        developing = {
            ("POST", "/pause"): self.pause,
            ("POST", "/resume"): self.resume,
            ("POST", "/collective_rpc"): lambda: self.rpc(body),
            ("POST", "/reset_prefix_cache"): self.reset,
            ("POST", "/update_weight_version"): lambda: self.name(body["new_version"]),
            ("GET", "/weight_info"): lambda: {"weight_version": self.label},
            ("POST", "/v1/load_lora_adapter"): lambda: self.load_adapter(body),
            ("POST", "/v1/unload_lora_adapter"): lambda: self.unload_adapter(body["lora_name"]),
            ("GET", "/get_world_size"): lambda: {"world_size": self.workers},
            ("POST", "/init_weight_transfer_engine"): lambda: self.join(body["init_info"]),
            ("POST", "/start_weight_update"): self.start_update,
            ("POST", "/update_weights"): lambda: self.receive(body["update_info"]),
            ("POST", "/finish_weight_update"): self.finish_update,
        }
        act = {**plain, **(developing if self.dev else {})}.get((method, route))
        if act is None:
            return 404, {"detail": "Not Found"}
        with self._guard:
            try:
                return 200, act()
            except LookupError as error:
                return 404, {"error": {"message": str(error), "code": 404}}
            except (ValueError, OSError) as error:
                return 500, {"error": {"message": str(error), "code": 500}}

    def pause(self) -> dict[str, str]:
        self.paused = True
        return {"status": "paused"}

    def resume(self) -> dict[str, str]:
        self.paused = False
        return {"status": "resumed"}

    def name(self, label: str) -> dict[str, Any]:
        self.label = label
        return {"success": True, "new_version": label}

    def rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights" and self.paused
        path = Path(body["kwargs"]["weights_path"])
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"Cannot find any model weights with `{path}`")
        if not self.deaf:
            self.model, _ = loaded(path)
        return {"results": [None]}

    def reset(self) -> dict[str, bool]:
        if self.held:
            self.held -= 1
            return {"success": False}
        if not self.sticky:
            self.cache.clear()
        return {"success": True}

    # ------------------------------------------------------------------ adapters

    def load_adapter(self, body: dict[str, Any]) -> Text:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body["load_inplace"]:
            raise ValueError(f"The lora adapter '{name}' has already been loaded.")
        settings = json.loads((path / "adapter_config.json").read_text())
        if settings["use_dora"] or settings["modules_to_save"]:
            raise ValueError("vLLM does not yet support DoRA.")
        if not self.deaf:
            base, _ = loaded(self.folder)
            self.adapters[name] = PeftModel.from_pretrained(base, path).eval()
        else:
            self.adapters[name] = self.model
        return Text(f"Success: LoRA adapter '{name}' added successfully.")

    def unload_adapter(self, name: str) -> Text:
        if name not in self.adapters:
            raise ValueError(f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return Text(f"Success: LoRA adapter '{name}' removed successfully.")

    # ------------------------------------------------------------------ from GPU to GPU

    def join(self, info: dict[str, Any]) -> dict[str, str]:
        assert {*info} == {"master_address", "master_port", "rank_offset", "world_size"}
        with ThreadPoolExecutor(self.workers) as pool:
            own = [
                pool.submit(
                    gloo,
                    info["master_address"],
                    info["master_port"],
                    info["rank_offset"] + worker,
                    info["world_size"],
                )
                for worker in range(self.workers)
            ]
            self.groups = [each.result() for each in own]
        return {"message": "Weight transfer initialized"}

    def start_update(self) -> dict[str, str]:
        assert self.paused and self.update is None
        self.update = {}
        return {"message": "Weight update started"}

    def receive(self, info: dict[str, Any]) -> dict[str, str]:
        """Every worker gets every tensor, in the order that was told."""
        assert self.update is not None and {*info} == {"names", "dtype_names", "shapes"}

        def of_worker(group: Any) -> list[torch.Tensor]:
            found = []
            for dtype, shape in zip(info["dtype_names"], info["shapes"], strict=True):
                found.append(torch.empty(shape, dtype=getattr(torch, dtype)))
                group.broadcast(found[-1], 0).wait()
            return found

        with ThreadPoolExecutor(self.workers) as pool:
            first, *others = pool.map(of_worker, self.groups)
        for other in others:
            assert all(map(torch.equal, first, other))
        self.received = info["names"]
        self.update = dict(zip(info["names"], first, strict=True))
        return {"message": "Weights updated"}

    def finish_update(self) -> dict[str, str]:
        assert self.update
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(self.folder / "config.json", Path(folder) / "config.json")
            save_file(self.update, Path(folder) / "model.safetensors", {"format": "pt"})
            model, found = loaded(folder)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        if not self.deaf:
            self.model = model
        self.update = None
        return {"message": "Weight update finished"}

    # ------------------------------------------------------------------ completions

    @torch.no_grad()
    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """One choice for each of n."""
        assert not self.paused
        ids, model = body["prompt"], self.model_of(body["model"])
        if len(ids) + body["max_tokens"] > self.longest:
            raise ValueError("maximum context length")
        if body.get("prompt_logprobs") is not None:
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            columns = [
                {str(id): {"logprob": row[id].item(), "rank": 1, "decoded_token": "?"}}
                for row, id in zip(logprobs, ids[1:], strict=False)
            ]
            return self._choices({"prompt_logprobs": [None, *columns], "finish_reason": "length"})
        drawn, logprobs, reason, stopped = self._draw(ids, body)
        return self._choices(
            {
                "token_ids": drawn,
                "logprobs": {
                    "token_logprobs": logprobs,
                    "tokens": [f"token_id:{i}" for i in drawn],
                },
                "finish_reason": reason,
                "stop_reason": stopped,
            }
        )

    def model_of(self, name: str) -> Any:
        if name == "policy":
            return self.model
        if name not in self.adapters:
            raise LookupError(f"The model `{name}` does not exist.")
        return self.adapters[name]

    def _choices(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"object": "text_completion", "choices": [{"index": 0, "text": "", **choice}]}

    def _state(self, ids: list[int], body: dict[str, Any]) -> Any:
        """Keys and values of a prompt but its last token, as they were first computed."""
        place = (None if self.sticky else (body["model"], body.get("cache_salt")), tuple(ids))
        if len(ids) > 1 and place not in self.cache:
            model = self.model_of(body["model"])
            self.cache[place] = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        return copy.deepcopy(self.cache.get(place))

    def _draw(
        self, ids: list[int], body: dict[str, Any]
    ) -> tuple[list[int], list[float], str, int | str | None]:
        generator = torch.Generator().manual_seed(body["seed"])
        state, last, model = self._state(ids, body), ids[-1], self.model_of(body["model"])
        drawn: list[int] = []
        logprobs: list[float] = []
        while True:
            found = model(torch.tensor([[last]]), past_key_values=state, use_cache=True)
            state, raw = found.past_key_values, found.logits[0, -1].float()
            logits = self._processed(raw, ids + drawn, len(drawn), body)
            shares = logits.softmax(-1)
            greedy = body["temperature"] == 0
            last = int(shares.argmax() if greedy else shares.multinomial(1, generator=generator))
            told = raw if self.raw else logits
            drawn.append(last)
            logprobs.append(told.log_softmax(-1)[last].item())
            text = self.text_of(drawn)
            if last in body["stop_token_ids"]:
                return drawn, logprobs, "stop", last
            if string := next((each for each in body["stop"] if each in text), None):
                return drawn, logprobs, "stop", string
            if len(drawn) == body["max_tokens"]:
                return drawn, logprobs, "length", None

    def _processed(
        self, raw: torch.Tensor, seen: list[int], made: int, body: dict[str, Any]
    ) -> torch.Tensor:
        """In vLLM's order: minimum length, bias, penalties, temperature, min-p, top-k, top-p."""
        logits = raw.clone()
        if made < body["min_tokens"]:
            logits[body["stop_token_ids"]] = -torch.inf
        for id, bias in body.get("logit_bias", {}).items():
            logits[int(id)] += bias
        own = torch.tensor(sorted(Counter(seen)))
        penalty = body["repetition_penalty"]
        logits[own] = torch.where(logits[own] > 0, logits[own] / penalty, logits[own] * penalty)
        logits = logits / (body["temperature"] or 1.0)
        if body["temperature"] == 0:
            return logits
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < body["min_p"] * shares.max(), -torch.inf)
        if body["top_k"]:
            least = logits.topk(min(body["top_k"], len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        order = logits.argsort(descending=True)
        before = logits[order].softmax(-1).cumsum(-1) - logits[order].softmax(-1)
        logits[order[before >= body["top_p"]]] = -torch.inf
        return logits


# What stands for the program `vllm` on PATH: it says how it was called, and hands on what it is
# asked to the stub at STUB_URL. With DIES it ends at once; its child outlives it if it can.
PROGRAM = """#!{python} -S
import http.server, json, os, subprocess, sys, urllib.error, urllib.request
names = ("CUDA_VISIBLE_DEVICES", "VLLM_SERVER_DEV_MODE", "RANK", "WORLD_SIZE")
print(json.dumps([sys.argv[1:], {{n: os.environ.get(n) for n in names}}]), flush=True)
if "DIES" in os.environ:
    sys.exit("ValueError: No available memory for the cache blocks.")
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)

def ask(method, path, body):
    kind = {{"Content-Type": "application/json"}}
    request = urllib.request.Request(os.environ["STUB_URL"] + path, body, kind, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        status, content = ask(self.command, self.path, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    do_GET = do_POST = answer

words = dict(zip(sys.argv[3::2], sys.argv[4::2]))
if "STUB_URL" in os.environ:
    ask("POST", "/_started", json.dumps({{"model": sys.argv[2]}}).encode())
server = http.server.ThreadingHTTPServer((words["--host"], int(words["--port"])), Handler)
server.serve_forever()
"""


def install(folder: Path, python: str) -> None:
    """Put that program into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vllm").write_text(PROGRAM.format(python=python))
    (folder / "vllm").chmod(0o755)


@contextmanager
def listening(stub: Stub, port: int = 0) -> Iterator[str]:
    """Its address, within this block."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            try:
                status, content = stub.answer(self.command, self.path, body)
            except ConnectionError:
                self.close_connection = True
                return
            text = b"" if content is None else json.dumps(content).encode()
            if isinstance(content, Text):
                text = content.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except ConnectionError:
                return

        do_GET = do_POST = _answer

    class Server(ThreadingHTTPServer):
        request_queue_size = 512
        daemon_threads = True

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
