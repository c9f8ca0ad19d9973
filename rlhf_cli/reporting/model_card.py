"""The model card of an exported folder: README.md with front matter, as the hub reads it.

Only what was measured or written down is told; what is not known is said to be so, or left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlhf_cli.config.secrets import redacted
from rlhf_cli.data.templates import CHAT
from rlhf_cli.reporting.terminal import on_one_line

LIBRARY = "transformers"
SCORERS = {  # level of a reward model -> task of the hub, auto class
    "response": ("text-classification", "AutoModelForSequenceClassification"),
    "step": ("token-classification", "AutoModelForTokenClassification"),
    "token": ("token-classification", "AutoModelForTokenClassification"),
}


@dataclass
class Made:
    """A folder that went into the model, and how it came to be.

    hash: of its content, as `content_hash` has it.
    command: as it was typed; None where it is not known.
    parents: role -> path and hash, as they were when it was made.
    inputs: the same of files.
    fault: why its parents are not followed: `is gone`, `has changed since`.
    """

    path: str
    stage: str | None
    hash: str
    seed: int | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    parents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fault: str | None = None


@dataclass
class Card:
    """All that a card tells.

    kind: policy or reward; level: of a reward model.
    dtype: of the weights.
    chat: whether its tokenizer has a chat template.
    template: how prompts were written, `chat` or a text with {prompt} in it; None where nobody
        knows.
    ending: what ended the responses that a reward model was trained on; None where nobody knows.
    own_class: whether a file in the folder has the class of the model.
    base: hub id of the model that the chain began with; None where it has none.
    origin: in words where the chain began, for people.
    licence: the `license` entries of the base's own card.
    datasets: hub ids.
    chain: oldest first; the last is the folder that was exported.
    config: of its stage, as YAML; empty where there is none.
    metrics, checks: of its stage.json.
    scale: mean and std of a reward model's scores.
    evaluations: path of a report -> figures of this model, each {mean, stderr}.
    """

    name: str
    kind: str
    level: str
    dtype: str
    chat: bool
    template: str | None
    ending: str | None
    own_class: bool
    base: str | None
    origin: str
    licence: Mapping[str, str]
    datasets: Sequence[str]
    chain: Sequence[Made]
    config: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """README.md, without the value of any secret variable."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True)}---",
        f"# {on_one_line(card.name)}\n\n{_sentence(card)}",
        f"## Use\n\n{_fenced('python', _example(card))}",
        f"## How it was made\n\n{_lineage(card)}",
        *([f"## Recipe\n\n{recipe}"] if (recipe := _recipe(card)) else []),
        f"## Results\n\n{_results(card)}",
        f"## Base model and licence\n\n{_licence(card)}",
    ]
    return redacted("\n\n".join(parts) + "\n")


def front_matter(card: Card) -> dict[str, Any]:
    """The entries that the hub reads."""
    stages = [made.stage for made in card.chain if made.stage]
    kind = ["reward-model"] if card.kind == "reward" else []
    entries: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": _task(card)[0]}
    if card.base is not None:
        entries |= {"base_model": card.base, "base_model_relation": "finetune"}
    entries |= card.licence
    if card.datasets:
        entries["datasets"] = list(card.datasets)
    return {**entries, "tags": list(dict.fromkeys(["rlhf-cli", *kind, *stages]))}


def _task(card: Card) -> tuple[str, str]:
    if card.kind == "reward":
        return SCORERS[card.level]
    return "text-generation", "AutoModelForCausalLM"


def _sentence(card: Card) -> str:
    what = "reward model" if card.kind == "reward" else "policy"
    last = card.chain[-1]
    stage = f" that `{last.stage}` made" if last.stage else ""
    return f"A {what}{stage}, exported by rlhf-cli as whole {card.dtype} weights."


def _example(card: Card) -> str:
    """Python that asks the model as it was trained: a score stands at the end of a response."""
    place = f'place = "{card.name}"  # this folder, or its id on the hub'
    text = None if card.template in (None, CHAT) else str(card.template)
    asked = "Hello!" if text is None else text.replace("{prompt}", "Hello!")
    turns = '[{"role": "user", "content": "Hello!"}]'
    if card.kind == "policy":
        return (
            f"from transformers import pipeline\n\n{place}\n"
            'generate = pipeline("text-generation", place)\n'
            f"print(generate({turns if card.chat and text is None else repr(asked)}))"
        )
    auto = _task(card)[1]
    code = ", trust_remote_code=True" if card.own_class else ""
    response = f"{'Hi.' + (card.ending or '')!r}"
    lines = [
        f"from transformers import AutoTokenizer, {auto}\n\n{place}",
        "tokenizer = AutoTokenizer.from_pretrained(place)",
        f"model = {auto}.from_pretrained(place{code})",
    ]
    if card.template == CHAT:
        lines += [
            f"asked = tokenizer.apply_chat_template({turns}, tokenize=False, "
            "add_generation_prompt=True)",
            f"batch = tokenizer([asked + {response}], add_special_tokens=False, "
            'return_tensors="pt")',
        ]
    else:
        lines.append(f'batch = tokenizer([{asked!r} + {response}], return_tensors="pt")')
    lines.append("scores = model(**batch).logits.squeeze(-1)")
    if card.scale:
        lines.append(f"rewards = (scores - {card.scale['mean']}) / {card.scale['std']}")
    return "\n".join(lines)


def _lineage(card: Card) -> str:
    rows = [
        (
            made.stage or "-",
            f"`{made.path}`" + (f" ({made.fault})" if made.fault else ""),
            f"`{made.hash}`",
            "-" if made.seed is None else made.seed,
            _sources(made.parents) or "-",
            _sources(made.inputs) or "-",
        )
        for made in card.chain
    ]
    heads = ("stage", "folder", "hash", "seed", "made from", "rows and files")
    versions = card.chain[-1].versions
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _table(heads, rows) + (f"\n\nMade with {told}." if told else "")


def _sources(entries: Mapping[str, Mapping[str, str]]) -> str:
    """role: path (hash); a hash is the first 16 digits of a SHA-256."""
    return ", ".join(f"{role}: `{e['path']}` (`{e['hash']}`)" for role, e in entries.items())


def _recipe(card: Card) -> str:
    commands = "\n".join(made.command for made in card.chain if made.command)
    parts = [_fenced("sh", commands)] if commands else []
    if card.config:
        parts.append(
            "<details><summary>The config of the last stage</summary>\n\n"
            f"{_fenced('yaml', card.config.rstrip())}\n\n</details>"
        )
    return "\n\n".join(parts)


def _results(card: Card) -> str:
    parts = []
    for title, figures in (("metrics", card.metrics), ("checks", card.checks)):
        if rows := [(name, _figure(value)) for name, value in figures.items() if _known(value)]:
            parts.append(f"As `stage.json` has them, {title}:\n\n{_table((title, 'value'), rows)}")
    for place, figures in card.evaluations.items():
        if rows := [(name, _figure(value)) for name, value in figures.items() if _known(value)]:
            parts.append(f"By the evaluation `{place}`:\n\n{_table(('figure', 'value'), rows)}")
    return "\n\n".join(parts) or "Nothing was measured."


def _known(value: Any) -> bool:
    """Whether it is a number, or an estimate {mean, stderr}."""
    if isinstance(value, Mapping):
        return isinstance(value.get("mean"), int | float)
    return isinstance(value, int | float)


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        spread = value.get("stderr")
        return f"{value['mean']:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _licence(card: Card) -> str:
    said = ", ".join(card.licence.values())
    licence = (
        f"Its licence is {said}, as the card of the base says."
        if said
        else "No licence is written down there, so this card names none: ask whose weights it is."
    )
    return f"{card.origin} {licence if card.base or said else ''}".rstrip()


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return on_one_line(str(value)).replace("|", "\\|")


def _fenced(language: str, text: str) -> str:
    """A block with a fence longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
