"""What a run takes over from the policy that it starts with: template and lengths."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.data.limits import sampled_tokens
from rlhf_cli.folders.cached import folder_of
from rlhf_cli.folders.geometry import context_of as positions_of
from rlhf_cli.folders.manifest import Manifest, adapter_base, read_config, read_manifest, shapes_of
from rlhf_cli.runs.begun import config_of
from rlhf_cli.runs.out_files import is_claimed

KEYS = ("template", "chat_args", "max_prompt_tokens", "max_response_tokens")


def inherit(cfg: Run) -> list[str]:
    """Fill in the keys of data that are null from stage.json of `cfg.start`, and algo.max_tokens.

    It comes before anything else reads the config, so that the same command always means the same.

    Returns:
        What was taken over, a line.
    """
    data: Any = cfg.data
    theirs = told((read_manifest(cfg.start) if cfg.start is not None else None) or {})
    if cfg.start is not None and not Path(cfg.start).is_dir():
        theirs = before(cfg)  # a finished run stays so without its parent
    taken = {
        key: theirs[key]
        for key in KEYS
        if getattr(data, key) in (None, {}) and theirs.get(key) not in (None, {})
    }
    if data.chat_template is not None:
        taken.pop("template", None)  # it was asked for, and is for chats
    for key, value in taken.items():
        setattr(data, key, value)
    algo: Any = cfg.algo
    lines = [f"data.{key}={value!r}, as {cfg.start} was trained" for key, value in taken.items()]
    if hasattr(algo, "max_tokens") and algo.max_tokens is None:
        algo.max_tokens = longest_sample(cfg)
        lines.append(f"algo.max_tokens={algo.max_tokens}")
    return lines


def before(cfg: Run) -> dict[str, Any]:
    """The keys of data in the run that `out` is of, if it is one."""
    out = Path(cfg.out)
    with suppress(UserError, KeyError):
        return dict(config_of(out)["data"]) if is_claimed(out) else {}
    return {}


def told(manifest: Manifest) -> dict[str, Any]:
    """The keys of data that a stage.json tells."""
    return {**manifest, **manifest.get("limits", {})}


def longest_sample(cfg: Run) -> int:
    """How long a response is sampled that no key limits, in tokens."""
    return sampled_tokens(cfg.data.max_response_tokens, longest_learnt(cfg), context_of(cfg))


def longest_learnt(cfg: Run) -> int | None:
    """Tokens of the longest response that the start of a run has learnt from, if it tells."""
    said = (read_manifest(cfg.start) if cfg.start is not None else None) or {}
    return said.get("limits", {}).get("longest_response") or None


def context_of(cfg: Run) -> int | None:
    """Positions of the model that a run starts from; None where this machine does not know."""
    model: Any = getattr(cfg, "model", None)
    if cfg.start is None:
        return getattr(model, "context", None)
    folder = folder_of(adapter_base(cfg.start) or cfg.start)
    return positions_of(read_config(folder), shapes_of(folder))


def check_context(cfg: Run, path: str | None, context: int | None) -> None:
    """Prompt and response together fit into the positions of the model at `path`.

    Raises:
        UserError: they do not.
    """
    tokens = max(getattr(cfg.algo, "max_tokens", 0) or 0, cfg.data.max_response_tokens or 0)
    prompt = cfg.data.max_prompt_tokens or 0
    if path is not None and context is not None and prompt + tokens > context:
        raise UserError(
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} and responses of {tokens} tokens "
            f"do not fit the {context} positions of {path}; lower one of them"
        )
