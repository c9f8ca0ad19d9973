"""Datasets of the hub: what names one, its rows, and its held-out split."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_cli.config.errors import UserError
from rlhf_cli.data.raw import Raw, RowError
from rlhf_cli.data.tables import AT_A_TIME, first_line, rows_of_batches

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval", "evaluation")  # the first there is


@dataclass(frozen=True)
class HubName:
    """`owner/name@revision:config:split`, of which all but the first may be absent."""

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        name = self.repo + (f"@{self.revision}" if self.revision else "")
        if self.split:
            return f"{name}:{self.config or ''}:{self.split}"
        return name + (f":{self.config}" if self.config else "")


def hub_name(text: str) -> HubName | None:
    """A name of the hub's form, whether or not there is such a dataset; None of another form."""
    place, _, rest = text.partition(":")
    repo, _, revision = place.partition("@")
    if not NAME.fullmatch(repo):
        return None
    config, _, split = rest.partition(":")
    return HubName(repo, revision or None, config or None, split or None)


def read_hub(name: HubName, streaming: bool = False) -> Iterator[tuple[Raw | RowError, str]]:
    """Rows of a hub dataset, of its split `train` where none is named.

    Args:
        streaming: whether rows come as they are asked for, and nothing is kept on disk.

    Raises:
        UserError: it cannot be had.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            name.repo,
            name.config,
            split=name.split or "train",
            revision=name.revision,
            streaming=streaming,
        )
    except Exception as error:  # the library raises many kinds; each means that we have no rows
        raise UserError(
            f"no file {name}, and no hub dataset of that name: {first_line(error)}"
        ) from None
    place = str(name)
    tables = dataset.with_format("arrow").iter(AT_A_TIME)
    for row, number in rows_of_batches(tables, place):
        yield row, f"{place}:{number}"


def hub_held_out(name: HubName) -> HubName | None:
    """The validation or else the test split of a dataset of which no split is named.

    None where it has neither, and where the hub does not say.
    """
    if name.split is not None:
        return None
    from datasets import get_dataset_split_names

    try:
        splits = get_dataset_split_names(name.repo, name.config, revision=name.revision)
    except Exception:  # the library raises many kinds; reading the rows tells what is wrong
        return None
    found = next((split for split in HELD_OUT if split in splits), None)
    return HubName(name.repo, name.revision, name.config, found) if found else None
