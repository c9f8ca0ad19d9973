"""What the timings of benchmarks/speed.py run on: rows, a tokenizer and a random model.

Rows are pairs of dialogues as in Anthropic's HH, or where there is no file of them made-up ones of
like lengths. The tokenizer is a byte-level BPE learnt from them, filled up with entries that no
text makes, so that embedding and head have the size of a real model's.

    python benchmarks/speed_inputs.py FOLDER SHAPE [HH_JSONL]
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEARNT = 8000  # entries that are learnt; the rest only take room
MOST_PROMPT, MOST_RESPONSE = 384, 128  # tokens of a row that is kept
ANSWER = "\n\nAssistant:"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen2 family; `vocabulary` counts the tokenizer's entries."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_width(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads

    @property
    def body(self) -> int:
        """Weights outside of embedding and head, which are tied."""
        narrow = self.kv_heads * self.head_width
        attention = 2 * self.width * (self.width + narrow) + self.width + 2 * narrow
        return self.layers * (attention + 3 * self.width * self.feed_forward + 2 * self.width)

    @property
    def weights(self) -> int:
        """All numbers of the model."""
        return self.body + self.width * (self.vocabulary + 1)

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_width


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151_936),
    "3m": Shape(256, 512, 5, 4, 2, 3000),
    "tiny": Shape(32, 64, 2, 2, 1, 600),
}


def prepare(folder: Path, shape: Shape, source: Path | None = None) -> None:
    """Leave model, tokenizer and rows in a folder, unless they are there.

    model/ is in bfloat16; demonstrations.jsonl has a chosen response, pairs.jsonl both, and
    prompts.jsonl prompts of at most 256 tokens.
    """
    if (folder / "shape.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    raw = list(made_up(1500) if source is None else read_hh(source))
    tokenizer = learn(raw, shape.vocabulary)
    sized = [row for row in raw if fits(row, tokenizer)]
    short = [row for row in sized if len(tokenizer(row["prompt"]).input_ids) <= 256]
    write(folder / "pairs.jsonl", sized)
    write(
        folder / "demonstrations.jsonl",
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sized],
    )
    write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in short])
    save_model(folder / "model", shape, tokenizer)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))


def shape_of(folder: Path) -> Shape:
    """The shape of the model that was prepared there."""
    return Shape(**json.loads((folder / "shape.json").read_text()))


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a file, in their order."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """One row a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------- rows


def read_hh(file: Path) -> Iterator[dict[str, str]]:
    """Pairs of a file of HH's dialogues, up to the last turn alike, as prompt and two responses."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        end = row["chosen"].rfind(ANSWER) + len(ANSWER)
        prompt, chosen, rejected = row["chosen"][:end], row["chosen"][end:], row["rejected"][end:]
        if row["rejected"].startswith(prompt) and chosen.strip() and rejected.strip():
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def made_up(count: int) -> Iterator[dict[str, str]]:
    """Dialogues of random words, about as long as HH's."""
    draw = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprstv" for second in "aeiou"]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(2000)]
    often = [1 / (rank + 3) for rank in range(len(lexicon))]  # Zipf's law, roughly

    def words(median: float, spread: float, most: int) -> str:
        length = min(most, max(2, round(draw.lognormvariate(0, spread) * median)))
        return " " + " ".join(draw.choices(lexicon, often, k=length))

    for _ in range(count):
        prompt = f"\n\nHuman:{words(20, 0.7, 150)}"
        for _ in range(draw.choice((0, 0, 1, 1, 2))):
            prompt += f"{ANSWER}{words(35, 0.6, 100)}\n\nHuman:{words(15, 0.7, 60)}"
        both = {name: words(35, 0.7, 110) for name in ("chosen", "rejected")}
        yield {"prompt": prompt + ANSWER, **both}


def fits(row: dict[str, str], tokenizer: Any) -> bool:
    """Whether a row is no longer than those that are kept."""
    lengths = {name: len(tokenizer(text)["input_ids"]) for name, text in row.items()}
    response = max(lengths["chosen"], lengths["rejected"])
    return lengths["prompt"] <= MOST_PROMPT and response < MOST_RESPONSE


# --------------------------------------------------------------------------- tokenizer and model


def learn(rows: list[dict[str, str]], entries: int) -> Any:
    """A tokenizer of so many entries, of which at most LEARNT are learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(entries, LEARNT),
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    state = json.loads(bpe.to_str())
    vocabulary = state["model"]["vocab"]
    for number in range(len(vocabulary), entries):
        vocabulary[f"<unused{number}>"] = number
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def save_model(folder: Path, shape: Shape, tokenizer: Any) -> None:
    """A random model of a shape, in bfloat16, with its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # drawing 494M numbers takes a while
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) == shape.weights
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":  # in a process of its own, since it would keep what it has on a GPU
    prepare(Path(sys.argv[1]), SHAPES[sys.argv[2]], *map(Path, sys.argv[3:4]))
