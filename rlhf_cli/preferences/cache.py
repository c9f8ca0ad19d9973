"""Log-probs of a reference on disk."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_cli.config.schema.stages import DpoConfig
from rlhf_cli.data.items import Answers
from rlhf_cli.folders.files import as_umask_says, disk_fault, library_errors
from rlhf_cli.models.dtypes import name_of
from rlhf_cli.preferences.bootstrap import BOOTSTRAP
from rlhf_cli.ranks.agreement import together
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say


class ReferenceCache:
    """Log-probs of a reference on disk, so that a second run or a sweep over beta has no pass.

    The file is named after the reference's folder, the token ids of all responses (which rows,
    template, tokenizer and limits make) and the type of matrix products. It holds the hash of the
    reference's weights: one that was written for other weights is stale, and computed again. Of
    several ranks the first reads and writes it.
    """

    def __init__(
        self,
        folder: str,
        cfg: DpoConfig,
        origin: dict[str, str],
        answers: list[Answers],
        dtype: torch.dtype,
    ) -> None:
        """`dtype`: of the reference's products."""
        self._counts = [len(each.responses) for each in answers]
        data = hashlib.sha256()
        for each in answers:
            data.update(json.dumps([each.prompt, each.responses]).encode())
        self._key = {
            "reference": origin["hash"],
            "data": data.hexdigest(),
            "template": str(cfg.data.template),
            "dtype": name_of(dtype),
        }
        place = str(Path(cfg.out) / BOOTSTRAP) if origin["kind"] == BOOTSTRAP else origin["path"]
        name = hashlib.sha256(json.dumps({**self._key, "reference": place}).encode()).hexdigest()
        self.file = Path(folder) / f"{name[:16]}.safetensors"

    def read(self) -> list[Tensor] | None:
        """Per item the (K,) log-probs of its responses; None where they must be computed."""
        own = together(lambda: self._stored() if world().is_main else None)
        stored = world().gather([] if own is None else [own])
        return list(stored[0].split(self._counts)) if stored else None

    def _stored(self) -> Tensor | None:
        """The log-probs of all responses."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as stored:
                key, values = stored.metadata(), stored.get_tensor("logprobs")
            whole = key.pop("values") == digest_of(values)
        except (SafetensorError, KeyError):
            whole = False
        if not whole:
            say(f"{self.file}: damaged; the reference is scored again")
            return None
        if key != self._key or len(values) != sum(self._counts):
            say(f"{self.file}: stale, made with another reference; it is scored again")
            return None
        say(f"reference log-probs: read from {self.file}")
        return values

    def write(self, values: list[Tensor]) -> None:
        """Keep them, in the order of `read`; a disk that takes no cache is no failure."""
        if not world().is_main:
            return
        joined = torch.cat(values)
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")  # a sweep has several
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with library_errors(part):
                save_file({"logprobs": joined}, part, {**self._key, "values": digest_of(joined)})
            as_umask_says(part)
            part.replace(self.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            say(f"note: reference log-probs are not kept: {disk_fault(error) or error}")


def digest_of(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
