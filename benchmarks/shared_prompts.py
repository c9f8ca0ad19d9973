"""Responses to one prompt in padded rows, in packed ones, and with the prompt once.

    python benchmarks/shared_prompts.py [--model FOLDER --rows FILE] [--lengths PROMPT:RESPONSE ...]

`--rows` are dialogues under chosen and rejected; what goes up to the last "\\n\\nAssistant:" is
the prompt. Without them the groups are synthetic, for a random Llama of about 20M parameters: pairs
and rankings of four at each of the lengths. Each step runs forward and backward in all layouts in
turn. `tokens` is what a layout computes, pads included, over what padded rows do, `time` the same
of the median times.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_cli.data.batches import collate_answers, micro_batches
from rlhf_cli.data.items import Answers
from rlhf_cli.data.packing import PACKED, PADDED, SHARED, Layout
from rlhf_cli.models.forward import token_logprobs
from rlhf_cli.models.layouts import found_layout

TURN = "\n\nAssistant:"
PROMPT_TOKENS, RESPONSE_TOKENS = 384, 128
STEP = 32  # groups of one optimizer step
CHUNK = 1024  # positions whose logits exist at once


def dialogues(model: str, file: str, count: int) -> list[Answers]:
    """Pairs from a preference file; prompts keep their end, responses their beginning."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    groups = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        end = row["chosen"].rfind(TURN) + len(TURN)
        prompt, sides = row["chosen"][:end], (row["chosen"][end:], row["rejected"][end:])
        if row["rejected"].rfind(TURN) + len(TURN) == end and row["rejected"].startswith(prompt):
            replies = [[*ids_of(side), tokenizer.eos_token_id] for side in sides]
            start = [tokenizer.bos_token_id, *ids_of(prompt)[-PROMPT_TOKENS + 1 :]]
            groups.append(Answers(start, [each[:RESPONSE_TOKENS] for each in replies], None))
        if len(groups) == count:
            break
    return groups


def synthetic(prompt: int, response: int, answers: int, count: int) -> list[Answers]:
    """Random ids; lengths are uniform between half and the whole of those given."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        drawn = int(torch.randint(max(length // 2, 1), length + 1, (), generator=draw))
        tokens: list[int] = torch.randint(8000, (drawn,), generator=draw).tolist()
        return tokens

    return [
        Answers(ids(prompt), [ids(response) for _ in range(answers)], None) for _ in range(count)
    ]


def random_llama(width: int, layers: int) -> Any:
    """A decoder of 12 width^2 parameters a layer and 16000 width in both embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def seconds(model: Any, batches: list[list[Answers]], layout: Layout) -> float:
    """Forward and backward of one step; on the CPU, the time that this process got of it."""
    on_gpu = next(model.parameters()).is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    for groups in batches:
        batch = collate_answers(groups, next(model.parameters()).device, layout)
        token_logprobs(model, batch, chunk=CHUNK).logprobs.sum().backward()
    model.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(model: Any, groups: list[Answers], repeats: int, budget: int) -> None:
    """Print a line per layout."""
    assert found_layout(model)[0] == SHARED
    names = {"padded": PADDED, "packed": PACKED, "shared": SHARED}
    total = dict.fromkeys(names, 0.0)
    tokens = dict.fromkeys(names, 0)
    for start in range(0, len(groups), STEP):
        step = groups[start : start + STEP]
        batches = {name: micro_batches(step, budget, each) for name, each in names.items()}
        runs: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats + 1):
            for name, layout in names.items():
                runs[name].append(seconds(model, batches[name], layout))
        for name, layout in names.items():
            total[name] += statistics.median(runs[name][1:])  # the first warms up
            sizes = (collate_answers(each, layout=layout).ids.numel() for each in batches[name])
            tokens[name] += sum(sizes)
    for name in names:
        print(
            f"  {name}  {total[name]:.2f} s  tokens {tokens[name] / tokens['padded']:.2f}  "
            f"time {total[name] / total['padded']:.2f}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--rows")
    parser.add_argument("--lengths", nargs="*", default=["256:64", "128:128", "64:256"])
    parser.add_argument("--answers", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--count", type=int, default=32, help="groups")
    parser.add_argument("--width", type=int, default=384, help="of the random Llama")
    parser.add_argument("--layers", type=int, default=8, help="of the random Llama")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rows:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        cases = {args.rows: dialogues(args.model, args.rows, args.count)}
    else:
        model = random_llama(args.width, args.layers)
        cases = {
            f"prompt {prompt}, {answers} responses of {response}": synthetic(
                int(prompt), int(response), answers, args.count
            )
            for prompt, response in (pair.split(":") for pair in args.lengths)
            for answers in args.answers
        }
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}M parameters")
    for name, groups in cases.items():
        print(name)
        measure(model.to(args.device), groups, args.repeats, args.budget)


if __name__ == "__main__":
    main()
