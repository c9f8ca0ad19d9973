"""One timed job of one side, in the process that benchmarks/speed.py starts for it.

Takes what to do as JSON in its only argument, and prints what was measured as one JSON line: the
times of steps, the tokens and floating-point operations of each, peak memory. A step is timed from
one optimizer step to the next; of `gen` and `ragged` a step is a whole batch of responses.

Operations are those that the mathematics needs, for either side alike: a prompt that several
responses share counts once, padding and recomputation not at all.
"""

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from speed_inputs import Shape, rows_of, shape_of

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# --------------------------------------------------------------------------- what is counted


@dataclass
class Work:
    """The sequences of a step: prompt -> lengths of the responses to it, and tokens with loss."""

    responses: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    scored: int = 0

    def add(self, prompt: Iterable[int], lengths: Sequence[int], scored: int) -> None:
        """One more prompt with responses."""
        self.responses.setdefault(tuple(prompt), []).extend(lengths)
        self.scored += scored

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, a prompt with each of its responses."""
        return sum(
            len(prompt) * len(lengths) + sum(lengths) for prompt, lengths in self.responses.items()
        )

    def forward(self, shape: Shape, head: bool = True) -> float:
        """Operations of one forward pass; two for each weight and token."""
        unique, reached = 0, 0.0
        for prompt, lengths in self.responses.items():
            start = len(prompt)
            unique += start + sum(lengths)
            reached += start**2 / 2 + sum(start * own + own**2 / 2 for own in lengths)
        attention = 4 * shape.layers * shape.heads * shape.head_width * reached
        logits = 2 * shape.width * shape.vocabulary * self.scored if head else 0
        return 2 * shape.body * unique + attention + logits


def operations(job: str, work: Work, shape: Shape) -> float:
    """Of a step: a backward pass costs two forward ones.

    dpo scores the pairs with the reference once more, grpo samples and scores, ppo has a critic.
    """
    if job == "reward":
        return 3 * work.forward(shape, head=False)
    if job == "ppo":
        return 5 * work.forward(shape) + 4 * work.forward(shape, head=False)
    return {"sft": 3, "dpo": 4, "grpo": 5}[job] * work.forward(shape)


def of_ours(parts: Sequence[Any]) -> Work:
    """The sequences in the terms of an optimizer step of ours."""
    work = Work()

    def add(item: Any) -> None:
        if isinstance(item, (list, tuple)):
            for each in item:
                add(each)
        elif hasattr(item, "answers"):  # responses that are compared
            add(item.answers)
        elif hasattr(item, "tokens"):  # a trajectory
            add(item.tokens)
        else:
            lengths = [len(response) for response in item.responses]
            loss = getattr(item, "loss", None)
            work.add(item.prompt, lengths, sum(lengths) if loss is None else sum(loss))

    for part in parts:
        add(list(part.batches))
    return work


def of_trl(kept: Sequence[dict[str, Any]]) -> Work:
    """The sequences in what TRL's trainers hand to their loss."""
    work = Work()
    for inputs in kept:
        if "prompt_ids" in inputs:  # grpo
            columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            for prompt, real, _, own in zip(
                *(inputs[name].tolist() for name in columns), strict=True
            ):
                ids = [token for token, is_real in zip(prompt, real, strict=True) if is_real]
                work.add(ids, [sum(own)], sum(own))
            continue
        masks = inputs["attention_mask"].tolist()
        rows = [
            [token for token, real in zip(row, mask, strict=True) if real]
            for row, mask in zip(inputs["input_ids"].tolist(), masks, strict=True)
        ]
        if "completion_mask" in inputs:  # dpo
            scored = [sum(row) for row in inputs["completion_mask"].tolist()]
        elif "labels" in inputs:  # sft
            scored = [sum(token != -100 for token in row) for row in inputs["labels"].tolist()]
        else:  # reward: chosen, then rejected; what they share is the prompt
            half = len(rows) // 2
            starts = [
                len(os.path.commonprefix(both))
                for both in zip(rows[:half], rows[half:], strict=True)
            ]
            scored = [len(row) - start for row, start in zip(rows, starts * 2, strict=True)]
        for row, own in zip(rows, scored, strict=True):
            work.add(row[: len(row) - own], [own], own)
    return work


class Watch:
    """When steps ended, what memory they took, and what they worked on."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._ends: list[float] = []
        self._processor: list[float] = []
        self._first: float | None = None
        self.work: list[Any] = []
        self._peak = 0.0
        self._profiler: Any = None

    def stamp(self) -> None:
        """A step ended."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._ends.append(time.perf_counter())
        self._processor.append(time.process_time())
        if self._first is None:
            self._first = time.time() - self._spec["launched"]
        if len(self._ends) == self._spec["steps"] - 1 and self._spec.get("kernels"):
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif len(self._ends) == self._spec["steps"] and self._profiler is not None:
            self._profiler.stop()
            self._ends.pop()  # watching takes time
            self._processor.pop()

    def report(self, **more: Any) -> None:
        """Print the line; the first steps are warm-up."""
        import torch
        import transformers

        walls, processor = (
            [after - before for before, after in pairwise(ends)][self._spec["warm_up"] - 1 :]
            for ends in (self._ends, self._processor)
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        line = {
            "steps": walls,
            "processor": processor,
            "first_step_s": self._first,
            "peak_gib": self._peak,
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({} if self._profiler is None else {"kernels": kernels(self._profiler)}),
            **more,
        }
        print(json.dumps(line), flush=True)


def kernels(profiler: Any) -> dict[str, Any]:
    """What one step asked of the device: kernels and their seconds, the longest, calls of CUDA."""
    from torch.autograd import DeviceType

    rows = profiler.key_averages()
    on_device = [row for row in rows if row.device_type == DeviceType.CUDA]
    longest = sorted(on_device, key=lambda row: -row.self_device_time_total)[:12]
    return {
        "count": sum(row.count for row in on_device),
        "seconds": round(sum(row.self_device_time_total for row in on_device) / 1e6, 5),
        "longest": {row.key[:70]: [row.count, row.self_device_time_total] for row in longest},
        "calls": {row.key: row.count for row in rows if row.key.startswith("cuda")},
    }


def trained(watch: Watch, spec: dict[str, Any], works: list[Work], **more: Any) -> None:
    """Report steps of training, with the tokens and operations of each timed one."""
    shape = shape_of(Path(spec["folder"]))
    timed = works[spec["warm_up"] : spec["steps"] - bool(spec.get("kernels"))]
    watch.report(
        tokens=[work.tokens for work in timed],
        scored=statistics.fmean(work.scored for work in timed),
        operations=[operations(spec["job"], work, shape) for work in timed],
        **more,
    )


def sampled(
    watch: Watch, spec: dict[str, Any], prompts: list[int], batches: list[list[int]]
) -> None:
    """Report batches of responses.

    Weights are read once for each token of the longest response, what is cached once for each.

    Args:
        prompts: tokens of the prompt of each response of a batch.
        batches: tokens of the responses of each batch.
    """
    import torch

    shape = shape_of(Path(spec["folder"]))
    size = 2 if torch.cuda.is_available() else 4  # bytes of a number

    def read(lengths: list[int]) -> float:
        cached = sum(start * own + own**2 / 2 for start, own in zip(prompts, lengths, strict=True))
        return size * (max(lengths) * shape.weights + cached * shape.cached)

    timed = batches[spec["warm_up"] : spec["steps"] - bool(spec.get("kernels"))]
    watch.report(
        tokens=[sum(lengths) for lengths in timed],
        longest=statistics.fmean(max(lengths) for lengths in timed),
        bytes=[read(lengths) for lengths in timed],
    )


def sampled_model(spec: dict[str, Any]) -> Path:
    """The folder of the model that is sampled; that of `ragged` ends responses at all lengths.

    A random model's entries are nearly equally likely, so that the one of EOS is never drawn: there
    a share of all entries ends a response, on average after half of the most tokens.
    """
    plain = Path(spec["folder"], "model")
    if spec["job"] != "ragged":
        return plain
    length = spec["sampling"][2]
    folder = plain.with_name(f"ragged{length}")
    if not folder.exists():
        folder.mkdir()
        for file in plain.iterdir():
            if file.name != "generation_config.json":
                (folder / file.name).symlink_to(file.resolve())
        settings = json.loads((plain / "generation_config.json").read_text())
        vocabulary = shape_of(plain.parent).vocabulary
        settings["eos_token_id"] = [1, *range(2, vocabulary, length // 2)]
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


# --------------------------------------------------------------------------- ours


def ours(spec: dict[str, Any]) -> None:
    """A stage, as the command line runs it; or the engine that all stages sample with."""
    from rlhf_cli.cli import let_threads_sleep

    gc.disable()  # both as the command line does before it imports torch
    let_threads_sleep()
    if spec["job"] in ("gen", "ragged"):
        our_samples(spec)
        return
    from rlhf_cli.commands import stage
    from rlhf_cli.training.optimize import Optimizer

    watch, plain = Watch(spec), Optimizer.step

    def timed(self: Any, parts: Any, *rest: Any, **named: Any) -> Any:
        result = plain(self, parts, *rest, **named)
        watch.stamp()
        watch.work.append(parts)
        return result

    Optimizer.step = timed  # type: ignore[method-assign]
    out = Path(spec["folder"], "out", spec["job"])
    stage.run(spec["job"], [*our_words(spec), f"out={out}", *spec["overrides"]])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shown = [name for name in lines[-1] if name.startswith(("seconds/", "sampling_gap"))]
    medians = {
        name: statistics.median(line[name] for line in lines[spec["warm_up"] :] if name in line)
        for name in shown
    }
    trained(watch, spec, [of_ours(parts) for parts in watch.work], phases=medians)


def our_words(spec: dict[str, Any]) -> list[str]:
    """The overrides that make a stage the job."""
    import torch

    folder, job, steps = Path(spec["folder"]), spec["job"], spec["steps"]
    prompts, group, length = spec["sampling"]
    kind = {"sft": "demonstrations", "dpo": "pairs", "reward": "pairs"}.get(job, "prompts")
    words = [f"data.path={folder / kind}.jsonl", "data=rows", "data.eval_rows=20", "overwrite=true"]
    words += ["hardware.save_every=null", "algo.warmup_steps=0", "data.max_prompt_tokens=448"]
    if torch.cuda.is_available():
        words += ["hardware=gpu", "model.dtype=bfloat16"]
    response = length if job in ("grpo", "ppo") else 128
    words += [f"data.max_response_tokens={response}"]
    if job == "sft":
        words += ["model=pretrained", f"model.path={folder / 'model'}", f"algo.max_steps={steps}"]
        return [*words, f"algo.batch_size={spec['batch']}", "algo.epochs=9", "algo.keep=last"]
    words += [f"policy={folder / 'model'}", "algo.lr=1e-6"]
    if job in ("dpo", "reward"):
        rows = spec["batch"] * steps + 20
        words += [f"data.max_rows={rows}", "algo.epochs=1"]
        return [*words, f"algo.batch_size={spec['batch']}"]
    each = prompts if job == "grpo" else prompts * group
    words += ["reward=length:20", f"algo.steps={steps}", f"algo.max_tokens={length}"]
    words += [f"algo.batch_size={each}", f"algo.minibatch_size={each}", "algo.epochs=1"]
    return [*words, *([f"algo.group_size={group}"] if job == "grpo" else [])]


def our_samples(spec: dict[str, Any]) -> None:
    """Batches of responses from the engine, set up as `generate` does."""
    import torch

    from rlhf_cli.config.compose import compose
    from rlhf_cli.data.kinds import Prompt
    from rlhf_cli.rollout.sampling import Sampling
    from rlhf_cli.runs.begin import begin
    from rlhf_cli.runs.policy import policy_of

    folder, watch = Path(spec["folder"]), Watch(spec)
    count, group, length = spec["sampling"]
    model = sampled_model(spec)
    words = [f"policy={model}", "data=rows", f"data.path={folder / 'prompts.jsonl'}"]
    words += [f"out={folder / 'out' / 'generate'}", "overwrite=true", f"algo.samples={group}"]
    words += [f"algo.max_tokens={length}"]
    words += ["hardware=gpu", "model.dtype=bfloat16"] if torch.cuda.is_available() else []
    session = begin(compose("generate", [*words, *spec["overrides"]]))
    assert session is not None
    policy = policy_of(session, str(model))
    rows = rows_of(folder / "prompts.jsonl")[:count]
    prompts = policy.encoder.prompts([Prompt(row["prompt"], {}, "") for row in rows])
    batches = []
    for seed in range(spec["steps"]):
        policy.engine.update(policy.model)
        made = policy.engine.sample(prompts, Sampling(length), samples=group, seed=seed)
        watch.stamp()
        batches.append([len(each.tokens.response) for each in made])
    sampled(watch, spec, [len(each.tokens.prompt) for each in made], batches)


# --------------------------------------------------------------------------- peers


def trl(spec: dict[str, Any]) -> None:
    """TRL's trainer of the job; float32 weights under bfloat16 autocast, or in bfloat16 (trl16)."""
    from transformers import TrainerCallback

    watch = Watch(spec)

    class Stamp(TrainerCallback):
        def on_step_end(self, *words: Any, **named: Any) -> None:
            watch.stamp()
            watch.work.append([])

    trainer = trl_trainer(spec)
    trainer.add_callback(Stamp())
    plain = trainer.compute_loss
    watch.work.append([])

    def kept(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        names = ("input_ids", "attention_mask", "labels", "prompt_ids", "prompt_mask")
        names += ("completion_ids", "completion_mask")
        found = {name: inputs[name] for name in names if inputs.get(name) is not None}
        watch.work[-1].append(found)
        return plain(model, inputs, *rest, **named)

    trainer.compute_loss = kept
    trainer.train()
    trained(watch, spec, [of_trl(step) for step in watch.work[:-1]])


def trl_trainer(spec: dict[str, Any]) -> Any:
    """The trainer with settings like ours."""
    import torch
    import trl as library
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    folder, job, batch = Path(spec["folder"]), spec["job"], spec["batch"]
    prompts, group, length = spec["sampling"]
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if spec["side"] == "trl16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out" / "trl"),
        "max_steps": spec["steps"],
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": batch,
    }
    kind = {"sft": "demonstrations", "dpo": "pairs", "reward": "pairs"}.get(job, "prompts")
    name = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "grpo": "GRPO"}[job]
    more: dict[str, Any] = {}
    if job == "reward":
        auto = AutoModelForSequenceClassification
        model = auto.from_pretrained(folder / "model", num_labels=1, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    if job == "grpo":
        parts = spec["peer_parts"]
        settings |= {"per_device_train_batch_size": prompts * group // parts}
        settings |= {"gradient_accumulation_steps": parts, "num_generations": group}
        settings |= {"max_completion_length": length, "beta": 0.04}
        more["reward_funcs"] = lambda completions, **_: [-abs(len(c) - 20.0) for c in completions]
    else:
        settings["max_length"] = 512
    return getattr(library, f"{name}Trainer")(
        model=model,
        args=getattr(library, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(rows_of(folder / f"{kind}.jsonl")),
        processing_class=tokenizer,
        **more,
    )


def hf(spec: dict[str, Any]) -> None:
    """transformers' generate on all responses at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, watch = Path(spec["folder"]), Watch(spec)
    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(sampled_model(spec), padding_side="left")
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(sampled_model(spec), dtype=dtype)
    model = model.to("cuda" if gpu else "cpu").eval()
    count, group, length = spec["sampling"]
    rows = rows_of(folder / "prompts.jsonl")[:count]
    texts = [row["prompt"] for row in rows for _ in range(group)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    batches, width = [], inputs["input_ids"].shape[1]
    for seed in range(spec["steps"]):
        torch.manual_seed(seed)
        made = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length)
        watch.stamp()
        batches.append((made[:, width:] != tokenizer.pad_token_id).sum(1).tolist())
    sampled(watch, spec, inputs["attention_mask"].sum(1).tolist(), batches)


def ceilings(spec: dict[str, Any]) -> None:
    """What the machine does at most: matrix products, and bytes read and written by a copy."""
    import torch

    gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if gpu else lambda: None
    side, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    device = "cuda" if gpu else "cpu"
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**30 if gpu else 2**26, device=device)
    target = torch.empty_like(source)

    def best(work: Any, times: int) -> float:
        work()
        wait()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(times):
                work()
            wait()
            seconds.append((time.perf_counter() - start) / times)
        return min(seconds)

    products = 2 * side**3 / best(lambda: left @ right, 10 if gpu else 2)
    copied = 2 * source.nbytes / best(lambda: target.copy_(source), 10 if gpu else 2)
    name = torch.cuda.get_device_name() if gpu else "cpu"
    line = {"device": name, "operations_per_s": products, "bytes_per_s": copied}
    print(json.dumps({**line, "threads": torch.get_num_threads(), "torch": torch.__version__}))


SIDES = {"ours": ours, "trl": trl, "trl16": trl, "hf": hf, "ceilings": ceilings}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    SIDES[given["side"]](given)
