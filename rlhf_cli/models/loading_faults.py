"""One line for whatever a library says of a folder, or where memory runs out over it."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.folders.manifest import adapter_base, shapes_of
from rlhf_cli.models.nonfinite import first_nonfinite
from rlhf_cli.models.out_of_memory import if_it_fits, ran_out

transformers_logging.set_verbosity_error()
hub_logging.set_verbosity_error()  # each try to reach it is no news, that all failed is told
transformers_logging.disable_progress_bar()
# what these libraries will rename is no news to our users
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")

Rest = ParamSpec("Rest")
Loaded = TypeVar("Loaded")


@contextmanager
def told(what: str) -> Iterator[None]:
    """One line for whatever a library raises over a folder: each raises many kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(f"{what}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of what a library says; what to do where that is known."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own; read that, then set model.trust_remote_code=true"
    if "couldn't connect to" in str(error):
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub does not answer"
        return f"it is not on this machine, and {why}; go online once, or name a folder"
    if "gated repo" in str(error):
        return "it is gated: ask for access on its page of the hub, and set HF_TOKEN to your token"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fits(
    load: Callable[Concatenate[str, Rest], Loaded],
) -> Callable[Concatenate[str, Rest], Loaded]:
    """A loader of the folder or hub id given first, with a line for when memory runs out."""

    @wraps(load)
    def loader(path: str, *args: Rest.args, **kwargs: Rest.kwargs) -> Loaded:
        loaded = if_it_fits(lambda: load(path, *args, **kwargs))
        if loaded is None:
            shapes = shapes_of(Path(adapter_base(path) or path))
            count = sum(map(math.prod, shapes.values()))
            size = f": {count} weights x 4 bytes = {count * 4 / 2**30:.2f} GiB" if count else ""
            raise RunError(
                f"out of memory while loading {path}{size}; what helps: a smaller model, or fewer "
                "roles with weights of their own (--check counts them)"
            )
        return loaded

    return loader


def check_finite(path: str, weights: Mapping[str, Tensor]) -> None:
    """Stop where a folder holds a weight that is not finite."""
    if (name := first_nonfinite(weights)) is not None:
        raise UserError(
            f"{path}: weight {name} holds a NaN or an infinity; make or download the folder again"
        )
