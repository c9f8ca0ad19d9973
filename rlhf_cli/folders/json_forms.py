"""What the JSON files of a model folder must look like where they are read: anyone may edit them.

A form is a type (of which Path is text that can be one), a Number, a list (of one form, or of one
for each place), Each, a tuple of a form and None, or an object: its keys and their forms. `key?`
may be absent, `*` stands for every key. Other keys are free.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.config.paths import is_path

Form = Any


@dataclass(frozen=True)
class Number:
    """A finite number from `least` to `most`, in words."""

    words: str
    least: float = -sys.float_info.max
    most: float = sys.float_info.max
    whole: bool = False

    def fits(self, value: Any) -> bool:
        """Whether a value is such a number; true and false are none, nor is JSON's NaN."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.least <= value <= self.most


@dataclass(frozen=True)
class Each:
    """A value of one form, or a list of values of another: one for each block of a model."""

    alone: Form
    listed: Form


REAL = Number("a finite number")
POSITIVE = Number("a number above 0", least=math.ulp(0.0))
COUNT = Number("a whole number of 0 or more", least=0, most=2**63, whole=True)
LENGTH = Number("a whole number of 1 or more", least=1, most=2**53, whole=True)
SIZE = Number("a whole number from 1 to 2^31", least=1, most=2**31, whole=True)
RANK = Number("a whole number from 0 to 2^31", least=0, most=2**31, whole=True)
WORDS = {str: "text", Path: "a path", bool: "true or false", dict: "an object", list: "a list"}

_MADE_FROM: Form = {"*": {"path": Path, "hash": str}}
PROVENANCE: Form = {"parents?": _MADE_FROM, "inputs?": _MADE_FROM}
STAGE: Form = {
    "kind": str,
    "stage?": str,
    "complete?": bool,
    **PROVENANCE,
    "files?": {"*": {"size": COUNT, "sha256": str}},
    "eos_ids?": [COUNT],
    "template?": str,
    "chat_args?": dict,
    "limits?": {
        "max_prompt_tokens?": (LENGTH, None),
        "max_response_tokens?": (LENGTH, None),
        "longest_response?": COUNT,
    },
    "level?": str,
    "adapter?": dict,
    "head?": {"target?": (str, None), "aggregate?": (str, None), "step_end?": (str, None)},
    "reward?": {"mean?": REAL, "std?": POSITIVE},
    "implicit_reward?": {"beta": REAL, "per_token": bool, "reference": Path, "hash": str},
    "metrics?": {"eval/auc?": (REAL, None), "eval/accuracy?": (REAL, None)},
    "seconds?": REAL,
    "step?": COUNT,
    "exported?": {
        "stage?": (str, None),
        "step?": COUNT,
        "options": dict,
        "written": [str],
    },
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "n_inner",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
)
LAYERS = ("num_hidden_layers", "n_layer")
# null stands for a size that follows from others; some families have one for each block
_WIDTHS: Form = {
    **{f"{name}?": (Each(SIZE, (COUNT, None)), None) for name in SIZES},
    **{f"{name}?": (SIZE, None) for name in (*LAYERS, "max_position_embeddings", "n_positions")},
}
CONFIG: Form = {"architectures?": ([str], None), "text_config?": (_WIDTHS, None), **_WIDTHS}
RANKS = ("r", "init_r", "target_r", "num_virtual_tokens")
ADAPTER: Form = {
    "base_model_name_or_path": Path,
    "task_type?": (str, None),
    "rank_pattern?": (dict, None),  # AdaLoRA has lists in it
    "target_modules?": (Each(str, str), None),
    "modules_to_save?": ([str], None),
    **{f"{name}?": (REAL, None) for name in ("lora_alpha", "lora_dropout")},
    **{f"{name}?": (RANK, None) for name in RANKS},  # OFT has 0 where a size of blocks is given
}
INDEX: Form = {"weight_map": {"*": str}}
TOKENIZER: Form = {"model": dict}
HEADER: Form = {"*": {"dtype": str, "shape": [COUNT], "data_offsets": [COUNT, COUNT]}}


def misfit(value: Any, form: Form, name: str = "it") -> str | None:
    """What is wrong with a value, as `parents.policy.hash is 3, not text`; None if it fits."""
    if isinstance(form, tuple):
        return None if value is None else misfit(value, form[0], name)
    if isinstance(form, Each):
        return misfit(value, [form.listed] if isinstance(value, list) else form.alone, name)
    if isinstance(form, Number):
        return None if form.fits(value) else f"{name} is {_shown(value)}, not {form.words}"
    kind: type = form if isinstance(form, type) else type(form)
    right = isinstance(value, str if kind is Path else kind)
    if not right or not _is_sound(value, kind):
        return f"{name} is {_shown(value)}, not {WORDS[kind]}"
    if isinstance(form, list):
        if len(form) > 1 and len(value) != len(form):
            return f"{name} holds {len(value)} entries, not {len(form)}"
        forms = form * len(value) if len(form) == 1 else form
        faults = (misfit(value[i], each, f"{name}[{i}]") for i, each in enumerate(forms))
        return next((fault for fault in faults if fault), None)
    return _misfit_inside(value, form, name) if isinstance(form, dict) else None


def _misfit_inside(value: dict[str, Any], form: Form, name: str) -> str | None:
    """What is wrong inside an object."""
    prefix = "" if name == "it" else f"{name}."
    for key, inner in form.items():
        for each in value if key == "*" else [key.removesuffix("?")]:
            if each in value:
                if fault := misfit(value[each], inner, prefix + each):
                    return fault
            elif not key.endswith("?"):
                return f"{prefix}{each} is missing"
    return None


def _is_sound(value: Any, kind: type) -> bool:
    """Whether text can be written and, where it is one, be a path."""
    if kind is Path:
        return is_path(value)
    try:
        return kind is not str or value.encode() is not None
    except UnicodeEncodeError:  # half a character
        return False


def _shown(value: Any) -> str:
    """A value as an error line has room for."""
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}..."
