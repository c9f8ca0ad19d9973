"""What a model folder says need not end, nor fit its other files: a line, and in time."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.time_limit import time_limit
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.integrity import check_whole
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scorers import load_scorer, scorer_from_policy
from rlhf_cli.models.tokenizers import load_tokenizer
from tests.toys import FROZEN, bpe, characters, data_of, llama, model_of

CPU = torch.device("cpu")
LORA = model_of(lora_rank=4, lora_alpha=16.0)
NEVER = r"([a-z_.]+)*\d+([a-z_.]+)*!"


def changed(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "policy"
    save_model(llama(len(bpe())), bpe(), place, merge=True)
    return place


# --------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "entries",
    [
        {"num_labels": 10**9},
        {"text_config": {"num_labels": 10**9}},
        {"vision_config": {"num_labels": 10**9}},
    ],
)
def test_more_labels_than_any_weight_has_are_refused(entries: Any, folder: Path) -> None:
    check_whole(folder)
    changed(folder / "config.json", num_labels=2)
    check_whole(folder)
    changed(folder / "config.json", **entries)
    with pytest.raises(UserError, match=r"config\.json: num_labels=1000000000 is more than"):
        check_whole(folder)


@pytest.mark.parametrize("entries", [{"rank_pattern": {"q_proj": 10**9}}, {"r": 10**9}])
def test_a_rank_that_no_weight_has_is_refused(entries: Any, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    save_model(load_policy(str(folder), LORA, bpe(), CPU), bpe(), place, merge=False)
    check_whole(place)
    changed(place / "adapter_config.json", **entries)
    with pytest.raises(UserError, match=r"adapter_config\.json: r=1000000000 is more than"):
        check_whole(place)


# --------------------------------------------------------------------------- time


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time."""
    monkeypatch.setattr(time_limit.__wrapped__, "__defaults__", (1.0,))  # type: ignore[attr-defined]


def test_time_is_limited_and_the_limit_goes() -> None:
    with pytest.raises(TimeoutError, match=r"does not end within 0\.1 s"), time_limit(0.1):
        while True:
            pass
    with time_limit(0.05):
        time.sleep(0.2)  # no processor time
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass


USES: dict[str, Callable[[Path, Path], object]] = {
    "merged": lambda place, _: load_policy(str(place), FROZEN, bpe(), CPU),
    "continued": lambda place, _: load_policy(str(place), LORA, bpe(), CPU),
    "as trunk": lambda place, _: scorer_from_policy(str(place), LORA, bpe(), 0, CPU),
    "on the policy's base": lambda place, base: load_scorer(
        str(place), FROZEN, bpe(), CPU, load_policy(str(base), LORA, bpe(), CPU)
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
@pytest.mark.usefixtures("short")
@pytest.mark.slow
def test_a_pattern_of_layers_that_never_ends(
    key: str, use: str, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "adapter"
    save_model(load_policy(str(folder), LORA, bpe(), CPU), bpe(), place, merge=False)
    more = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
    changed(place / "adapter_config.json", **{key: NEVER}, **more)
    with pytest.raises(UserError, match=r"adapter: the pattern .* does not end within"):
        USES[use](place, folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{% if messages|length > 1 %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
    ],
)
@pytest.mark.usefixtures("short")
def test_a_chat_template_that_never_ends(template: str) -> None:
    tokenizer = bpe(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template of .* fails: it does not end within"):
        Encoder(tokenizer, data_of(template="chat"))


# --------------------------------------------------------------------------- another class

SAME = ["PreTrainedTokenizerFast", "TokenizersBackend", "NobodysTokenizer"]


@pytest.mark.parametrize("make", [bpe, characters])
@pytest.mark.parametrize("name", SAME)
def test_a_class_that_reads_the_file_as_it_is(name: str, make: Any, folder: Path) -> None:
    make().save_pretrained(folder)
    changed(folder / "tokenizer_config.json", tokenizer_class=name)
    found = load_tokenizer(str(folder), FROZEN)
    assert found("the cat").input_ids == make()("the cat").input_ids


@pytest.mark.parametrize("make", [bpe, characters])
@pytest.mark.parametrize(
    "name",
    ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer", "T5Tokenizer"]
    + ["ByT5Tokenizer", "XLNetTokenizer", "CanineTokenizer", "WhisperTokenizer", "PythonBackend"]
    + ["AutoTokenizer", "LlamaModel", ""],
)
def test_another_class_keeps_all_tokens_and_text_or_is_refused(
    name: str, make: Any, folder: Path
) -> None:
    make().save_pretrained(folder)
    changed(folder / "tokenizer_config.json", tokenizer_class=name)
    try:
        found = load_tokenizer(str(folder), FROZEN)
    except UserError as error:
        assert "tokenizer" in str(error)
        return
    assert make().get_vocab().items() <= found.get_vocab().items()
    for text in ("thecat", "cat"):
        assert str(found.decode(found(text, add_special_tokens=False).input_ids)).strip() == text
