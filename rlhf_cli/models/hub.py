"""Model folders from the hub, and to it."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from rlhf_cli.config.errors import RunError, UserError
from rlhf_cli.models.loading_faults import first_line

READ = (  # of a repository: nothing of it is a pickle
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)


def downloaded(repo: str) -> Path:
    """The folder of a hub id on this disk, fetched where it is not there yet.

    Raises:
        UserError: there is no such repository, or it cannot be had now.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, allow_patterns=[*READ], ignore_patterns=["*/*"])
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(f"{repo} is no folder, and is not to be had from the hub now") from None
    except Exception as error:  # httpx, requests and the hub have many kinds
        raise UserError(f"{repo} is no folder, and the hub says: {first_line(error)}") from None


def cached(repo: str, name: str) -> Path | None:
    """A file of a hub id where it has been fetched before; None elsewhere."""
    try:
        found = huggingface_hub.try_to_load_from_cache(repo, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def check_push(name: str) -> None:
    """Stop before any work where nothing could be pushed.

    Raises:
        UserError: the hub is switched off, the name is none, or nobody is logged in.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"push={name}: HF_HUB_OFFLINE is set; unset it, or leave push out")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push={name}: {first_line(error)}") from None
    if huggingface_hub.get_token() is None:
        raise UserError(f"push={name}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder as a model repository, and return its address.

    Raises:
        RunError: the hub refuses; or a repository of that name is public where a private one was
            asked for, or the other way round.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        if bool(api.repo_info(made.repo_id).private) != private:
            seen = "public" if private else "private"
            raise RunError(
                f"push={name}: {made.repo_id} is there and {seen}; set private="
                f"{str(not private).lower()}, or name another"
            )
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload by rlhf-cli export"
        )
    except RunError:
        raise
    except Exception as error:  # httpx, requests and the hub have many kinds
        raise RunError(
            f"push={name}: {first_line(error)}; {folder} is whole, the same command pushes it"
        ) from None
    return str(made)
