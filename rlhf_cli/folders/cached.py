"""Models of the hub that this machine has downloaded before, found without asking the network."""

from pathlib import Path


def folder_of(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or what a hub id's download has left on this machine.

    Of a hub id that was never downloaded it is no folder.
    """
    folder = Path(path)
    if folder.exists() or len(folder.parts) > 2 or folder.is_absolute():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(str(path), "config.json")
    except HFValidationError:  # what can be no hub id
        return folder
    return Path(file).parent if isinstance(file, str) else folder
