"""What the package may not call: a shell, code from text, pickles, unsafe YAML."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_cli"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.save", "torch.hub", "pandas.read_pickle", "runpy.run_path"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
}
KEYWORDS = {"shell": False, "allow_pickle": False, "weights_only": True, "use_safetensors": True}


def offences(source: str) -> Iterator[str]:
    """What a module does that it may not, with its line."""
    for node in ast.walk(ast.parse(source)):
        found: set[str] = set()
        if isinstance(node, ast.Import):
            found = {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole = {f"{module}.{alias.name}" for alias in node.names}
            found = {module.partition(".")[0]} & MODULES | whole & ATTRIBUTES
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found = {node.id} & NAMES
        elif isinstance(node, ast.Attribute):
            found = {ast.unparse(node)} & ATTRIBUTES
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            safe = isinstance(node.value, ast.Constant) and node.value.value is KEYWORDS[node.arg]
            found = set() if safe else {f"{node.arg}={ast.unparse(node.value)}"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
            loaders = [each for each in node.keywords if each.arg == "Loader"]
            found = set() if loaders else {"yaml.load without a loader"}
        for name in found:
            yield f"line {node.lineno}: {name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_the_package_calls_nothing_that_runs_what_it_reads(file: Path) -> None:
    assert list(offences(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill.source",
        "from pickle import loads",
        "from torch import load",
        "torch.load(file)",
        "x = torch.load",
        "os.system(word)",
        "from os import system",
        "subprocess.run(word, shell=True)",
        "subprocess.run(word, shell=chosen)",
        "numpy.load(file, allow_pickle=True)",
        "auto.from_pretrained(path, use_safetensors=False)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
    ],
)
def test_offences_are_found(source: str) -> None:
    assert len(list(offences(source))) == 1


def test_what_only_sounds_alike_is_none() -> None:
    source = "model.eval()\nre.compile(x)\nsubprocess.run([x])\nyaml.safe_load(x)\nrow.exec\n"
    assert list(offences(source)) == []
