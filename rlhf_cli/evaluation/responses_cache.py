"""Responses kept by content: the same policy, prompts and sampling need not be sampled again.

An evaluation with one baseline more, or another judge, takes from here what one before has sampled.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import EvaluateConfig
from rlhf_cli.data.items import EncodedPrompt, Tokens
from rlhf_cli.folders.journal import Journal
from rlhf_cli.folders.json_forms import COUNT, REAL, Form, misfit
from rlhf_cli.folders.manifest import content_hash
from rlhf_cli.ranks.agreement import by_main
from rlhf_cli.rollout.rollouts import Rollout
from rlhf_cli.rollout.sampling import Sampling

RESPONSE: Form = {"text": str, "finish_reason": str, "ids": [COUNT], "logprobs": [REAL]}


class ResponsesCache:
    """The folder that responses_cache names; without one nothing is kept."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        self._cfg = cfg

    def file(
        self,
        name: str,
        path: str,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        samples: int,
        device: str,
    ) -> Path | None:
        """Where the responses of a policy lie; None without a folder.

        Its name stands for all that they depend on: the bytes of the policy and the name that its
        draws hang on, the seed, the ids of the prompts, the options, and what computes.
        """
        if self._cfg.responses_cache is None:
            return None
        told: dict[str, Any] = {
            "version": __version__,
            "policy": [name, content_hash(path)],
            "seed": self._cfg.seed,
            "sampling": asdict(sampling),
            "samples": samples,
            "prompts": [ids for _, ids in prompts],
            "computes": [device, self._cfg.model.dtype, self._cfg.hardware.rollout],
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return Path(self._cfg.responses_cache).expanduser() / f"{digest[:24]}.jsonl"

    def read(
        self, file: Path | None, prompts: Sequence[EncodedPrompt], samples: int
    ) -> list[Rollout] | None:
        """All responses, prompt by prompt; None where they are not there, or damaged."""
        if file is None or not by_main(file.is_file):
            return None
        records = [record for block in Journal(file).blocks() for record in block]
        whole = len(records) == len(prompts) * samples
        if not whole or any(misfit(record, RESPONSE) is not None for record in records):
            return None
        rows = [prompt for prompt in prompts for _ in range(samples)]
        return [
            Rollout(
                row,
                Tokens(ids, record["ids"], row.source),
                record["logprobs"],
                record["finish_reason"],
                record["text"],
            )
            for (row, ids), record in zip(rows, records, strict=True)
        ]

    def write(self, file: Path | None, rollouts: Sequence[Rollout]) -> None:
        """Keep all responses; the file is whole or not there.

        Raises:
            UserError: the folder cannot be written.
        """
        if file is not None:
            by_main(lambda: _write(file, rollouts))


def _write(file: Path, rollouts: Sequence[Rollout]) -> None:
    records = [
        {
            "text": rollout.text,
            "finish_reason": rollout.finish_reason,
            "ids": rollout.tokens.response,
            "logprobs": rollout.logprobs,
        }
        for rollout in rollouts
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            Journal(part).append(records)
            os.replace(part, file)
    except OSError as error:
        raise UserError(
            f"responses_cache: cannot write {file.parent}: {error.strerror}; name another folder"
        ) from None
