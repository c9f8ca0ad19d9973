"""Every package that an installation brings in is under a licence that Apache-2.0 can live with."""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

import pytest
from packaging.requirements import Requirement

SPDX = {
    *("apache-2.0", "apache-2.0 with llvm-exception", "mit", "mit-0", "mit-cmu", "hpnd", "isc"),
    *("bsd-2-clause", "bsd-3-clause", "0bsd", "bsl-1.0", "zlib", "unlicense", "cc0-1.0"),
    *("psf-2.0", "python-2.0", "cnri-python"),
    "mpl-2.0",  # its files stay under it; what uses them need not be
}
NAMED = {
    *("apache 2.0 license", "apache license 2.0", "apache software license"),
    *("bsd", "bsd license", "new bsd license", "isc license (iscl)", "mit license"),
    *("python software foundation license", "mozilla public license 2.0 (mpl 2.0)"),
}
"""How the metadata of older packages calls the same licences."""

CUDA = ("nvidia-", "cuda-")
"""NVIDIA's libraries, which torch brings on systems with a GPU, under a licence of their own that
lets them be used and passed on as they are. We neither carry nor change them.
"""


def installed(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Distribution]:
    """A package and all that it needs, each once."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [(name, extras)]
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for other systems, or another Python
            continue
        yield found
        for text in found.requires or []:
            need = Requirement(text)
            markers = [{"extra": extra} for extra in extras or {""}]
            if need.marker is None or any(need.marker.evaluate(each) for each in markers):
                pending.append((need.name, frozenset(need.extras)))


def licences_of(package: Distribution) -> list[str]:
    """Each licence that the metadata names, the exact field first; several may be offered."""
    metadata: Any = package.metadata
    if expression := metadata.get("License-Expression"):
        return [str(expression)]
    classifiers = [
        each.rpartition(" :: ")[2]
        for each in metadata.get_all("Classifier") or []
        if each.startswith("License :: ") and not each.endswith("OSI Approved")
    ]
    text = (metadata.get("License") or "").strip()
    return classifiers or ([text.splitlines()[0]] if text else [])


def is_allowed(expression: str) -> bool:
    """Whether an SPDX expression, or a plain name, allows what Apache-2.0 asks for."""
    terms = re.split(r"\s+and\s+", expression.strip().lower())
    choices = [re.split(r"\s+or\s+", term) for term in terms]
    return all(any(name in SPDX | NAMED for name in names) for names in choices)


def test_all_dependencies_have_a_licence_that_allows_ours() -> None:
    refused = {}
    count = 0
    for package in installed("rlhf-cli"):
        count += 1
        name = package.metadata["Name"]
        found = licences_of(package) or ["unknown"]
        if not all(map(is_allowed, found)) and not name.startswith(CUDA):
            refused[name] = found
    assert count > 30
    assert refused == {}


@pytest.mark.parametrize(
    "name",
    [
        *("Apache-2.0", "Apache License 2.0", "Apache Software License", "MIT", "MIT License"),
        *("BSD-3-Clause", "BSD License", "New BSD License", "MPL-2.0", "PSF-2.0", "ISC"),
        *("Apache-2.0 OR BSD-2-Clause", "MIT AND BSD-3-Clause", "MIT OR GPL-3.0-only"),
    ],
)
def test_licences_that_allow_ours(name: str) -> None:
    assert is_allowed(name)


@pytest.mark.parametrize(
    "name",
    [
        *("GPL-3.0-only", "GNU General Public License v3 (GPLv3)", "AGPL-3.0", "LGPL-2.1-only"),
        *("CC-BY-NC-4.0", "Proprietary", "Other/Proprietary License", "unknown", ""),
        *("MIT AND GPL-3.0-only", "SSPL-1.0", "BUSL-1.1", "Apache-2.0 AND Proprietary"),
    ],
)
def test_licences_that_do_not(name: str) -> None:
    assert not is_allowed(name)
