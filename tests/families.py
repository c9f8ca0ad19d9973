"""Tokenizers as families of models have them, learned offline from a few sentences."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "User: Greet Ann, please.\nAssistant: Hello Ann! How are you today?",
    "Once upon a time, there was a small bird. It sang a song and the cat ran home.",
    'def add(a, b):\n    return a + b\n\nprint(add(1, 22))  # {"sum": 23}',
    "Ünïcode: élan, 中文, \U0001f600; numbers 1 234 5678.",
] * 3
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NAMES = ["<unk>", "<s>", "</s>", "<pad>"]
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]


def gpt2() -> Tokenizer:
    """Byte-level BPE as GPT-2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def roberta() -> Tokenizer:
    """The same with a blank before every text."""
    tokenizer = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def llama3() -> Tokenizer:
    """Byte-level BPE behind a regular expression of its own, as Llama 3 and Qwen have it."""
    tokenizer = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def llama2() -> Tokenizer:
    """SentencePiece BPE: a blank goes before the first word of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(
        [text.replace("\n", " ") for text in CORPUS],  # a line break is a byte
        trainers.BpeTrainer(vocab_size=520, special_tokens=[*NAMES, *BYTES], show_progress=False),
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(NAMES)]  # bytes are no special tokens
    return Tokenizer.from_str(json.dumps(state))


def llama2_legacy() -> Tokenizer:
    """The same as older files have it: the blank goes before all that follows a special token."""
    tokenizer = llama2()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer


def t5() -> Tokenizer:
    """SentencePiece unigrams, whose vocabulary has the special tokens in it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "always")
    tokenizer.decoder = decoders.Metaspace("\u2581", "always")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=220, special_tokens=NAMES, unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def bert() -> Tokenizer:
    """WordPieces, which know no blanks."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=NAMES, show_progress=False),
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (gpt2, roberta, llama3, llama2, llama2_legacy, t5, bert)
}


@cache
def state_of(name: str) -> str:
    """A tokenizer of FAMILIES as JSON, learned once."""
    return str(FAMILIES[name]().to_str())


def family(name: str, template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of a family with <s>, </s>, <pad> and chat tokens, and a chat template.

    Args:
        bos: whether it puts <s> before a text of its own accord.
    """
    backend = Tokenizer.from_str(state_of(name))
    backend.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in CONTROL]
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=CONTROL,
    )
    tokenizer.chat_template = template
    return tokenizer
