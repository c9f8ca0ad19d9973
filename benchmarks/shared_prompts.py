"""Responses to one prompt, computed with the prompt once or with it each time: what each takes.

    python benchmarks/shared_prompts.py [--model FOLDER --rows FILE] [--lengths PROMPT:RESPONSE ...]

`--rows` are dialogues under chosen and rejected; what goes up to the last "\\n\\nAssistant:" is
the prompt. Without them the groups are synthetic, for a random Llama of about 20M parameters: pairs
and rankings of four at each of the lengths. Each micro-batch runs forward and backward in both
layouts in turn. `tokens` is the padded size of the shared layout over that of the separate one,
`time` the same of the median times, and `ruled` of the layout that `sharing_pays` picks.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_cli.data.batches import collate_answers, cut, sharing_pays
from rlhf_cli.data.items import Answers
from rlhf_cli.models.forward import shares_prompts, token_logprobs

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


def seconds(model: Any, groups: list[Answers], share: bool) -> float:
    """Forward and backward of one micro-batch; on the CPU, the time that this process got of it."""
    on_gpu = next(model.parameters()).is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    batch = collate_answers(groups, next(model.parameters()).device, share)
    token_logprobs(model, batch, chunk=CHUNK).logprobs.sum().backward()
    model.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(model: Any, groups: list[Answers], repeats: int, budget: int) -> None:
    """Print a line per micro-batch and one of the sums."""
    assert shares_prompts(model)
    width = model.config.get_text_config().hidden_size
    separate = shared = ruled = 0.0
    for start in range(0, len(groups), STEP):
        step = groups[start : start + STEP]
        for batch in cut(step, budget, count=lambda group: len(group.responses)):
            runs: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(repeats + 1):
                for share, times in runs.items():
                    times.append(seconds(model, batch, share))
            # the first of each warms up
            median = {share: statistics.median(times[1:]) for share, times in runs.items()}
            size = {share: collate_answers(batch, share=share).ids.numel() for share in runs}
            separate += median[False]
            shared += median[True]
            ruled += median[sharing_pays(batch, width)]
            print(
                f"  {len(batch):3} groups  tokens {size[True] / size[False]:.2f}  "
                f"time {median[True] / median[False]:.2f}",
                flush=True,
            )
    print(
        f"separate {separate:.2f} s  shared {shared:.2f} s  time {shared / separate:.2f}  "
        f"ruled {ruled / separate:.2f}",
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
    parser.add_argument("--budget", type=int, default=4096, help="padded tokens of a micro-batch")
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
