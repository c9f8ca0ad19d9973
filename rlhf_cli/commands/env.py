"""`rlhf-cli env`: versions and devices, for a bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rlhf_cli.commands.help import columns
from rlhf_cli.config.errors import UserError

_PACKAGES = ("rlhf-cli", "torch", "transformers", "peft", "datasets", "hydra-core", "omegaconf")
USAGE = """\
rlhf-cli env: versions and devices, for a bug report.

Usage: rlhf-cli env"""


def run(words: list[str]) -> None:
    """Print one line per fact. Imports torch, which takes a second or two.

    Raises:
        UserError: words follow.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    if words:
        raise UserError(f"env takes no words, got {' '.join(words)}")
    import torch

    rows = [("python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, _version(name)) for name in _PACKAGES]
    cuda = torch.cuda.is_available()
    rows.append(("device", f"cuda ({torch.cuda.get_device_name()})" if cuda else "cpu"))
    rows.append(("threads", str(torch.get_num_threads())))
    print(columns(rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
