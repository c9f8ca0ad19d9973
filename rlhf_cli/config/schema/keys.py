"""What a key is: a field with a sentence, bounds or choices, and who reads it."""

from dataclasses import field
from typing import Any

AUTO = "auto"
OPTIONS = "what the shipped options say"
"""In `choices` and `used_by`: told by conf/ alone, so that a new loss is told nowhere else.

The values of such a key are those that the shipped options of the stage give it; a key that it
decides about is used by those whose option gives it a value other than null.
"""


def key(
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | str | None = None,
    role: str | None = None,
    own: tuple[str, ...] | None = None,
    used_by: str | None = None,
    needed: bool | str = False,
    unused: Any = None,
    texts: bool = False,
    regex: bool = False,
    auto: type | None = None,
) -> Any:
    """A mandatory dataclass field that carries one sentence and, optionally, bounds or choices.

    Args:
        choices: the values that the key knows, or OPTIONS.
        role: of a key that names models, what they are there: `policy` for folders and hub ids of
            language models, `reward` for sums of terms, as rewards/specs.py reads them.
        own: where the value may be a function of the user's, as path/to/file.py:function, what its
            parameters may be: tensors, and names of keys of the same group.
        used_by: the switch without which nothing reads the key: `algo.loss=clip|cispo` has one of
            these values, `algo.beams>1` is above that, `algo.refresh_reward` is not null; or
            OPTIONS.
        needed: whether null is refused where the key is used, or the switch under which it is.
        unused: the value that the key has where nothing reads it.
        texts: the key takes a text or a list of texts, for which OmegaConf has no type but Any.
        regex: whether the text may hold a regular expression, whose backslashes stay as they are.
            So they do where role is `reward`.
        auto: the type of a key that may be AUTO as well, for which OmegaConf has none but Any.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    told = {"meaning": meaning, **bounds, "role": role, "own": own, "used_by": used_by}
    given = {name: each for name, each in told.items() if each is not None}
    switches = {"needed": needed, "unused": unused, "texts": texts, "regex": regex, "auto": auto}
    return field(metadata={**given, **switches})
