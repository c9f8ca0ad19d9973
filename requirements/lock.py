"""Write the locks again: `make lock`, or `make lock UPGRADE=1` for the newest versions.

Without UPGRADE every version stays as it is where it fits pyproject.toml. The files:

    build.txt    what building takes: of this package, and of one that comes as source alone
    common.txt   everything but PyTorch; it reads build.txt itself
    cpu.txt      common.txt and PyTorch's own build for CPUs, which some machines' pip is offered
    default.txt  common.txt and PyTorch as the package index has it: with CUDA on Linux
    interop.txt  what the extra of that name adds to either

PyTorch stands twice, since pip prefers a file whose hash an index tells to one that it would have
to read first. Each version has the hashes of all its files, for all systems and Pythons.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = ("hatchling", "setuptools")
TORCH = re.compile(r"torch$|triton$|(cuda|nvidia)-")
# The builds for CPUs that are known; to allow another file, add what `pip hash FILE` says.
ON_CPU = {
    "torch==2.13.0+cpu": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",  # cp311, Linux, x86_64
    )
}


def compiled(requirements: Path, *words: str) -> dict[str, str]:
    """name -> its lines of a lock of these requirements and all that they need.

    There are more than one of a name whose newest version some Pythons cannot have.
    """
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
    command += ["--python-version=3.11", "--no-header", "--no-annotate", "--no-config"]
    command += ["--no-emit-index-url", "--no-emit-find-links", str(requirements), *words]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    blocks = re.findall(r"^\S.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    locked: dict[str, str] = {}
    for block in blocks:
        name = block.partition("==")[0]
        locked[name] = locked.get(name, "") + block
    return locked


def pins(*files: Path) -> str:
    """NAME==VERSION of each line of these locks that has one, and for which Pythons and systems."""
    text = "".join(map(Path.read_text, files))
    return "\n".join(re.findall(r"^\S+==\S+(?: ;[^\\\n]+)?", text, re.MULTILINE))


def main(upgrade: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known, wanted, locked = (Path(folder, name) for name in ("known", "wanted.in", "locked"))
        files = [HERE / f"{name}.txt" for name in ("build", "common", "default", "interop")]
        known.write_text("" if upgrade else pins(*files))
        everything = compiled(HERE.parent / "pyproject.toml", "--extra=dev", f"-c={known}")
        locked.write_text("".join(everything.values()))
        known.write_text(f"{pins(locked)}\n{'' if upgrade else pins(files[-1])}")
        extras = ("--extra=dev", "--extra=interop")
        more = compiled(HERE.parent / "pyproject.toml", *extras, f"-c={known}")
        wanted.write_text("\n".join(BUILD))
        build = compiled(wanted, f"-c={known}")
    torch = {name: block for name, block in everything.items() if TORCH.match(name)}
    (pin,) = ON_CPU
    if not torch["torch"].startswith(f"{pin.removesuffix('+cpu')} "):
        print(
            f"ON_CPU in lock.py has {pin}, the lock another: nobody gets that build",
            file=sys.stderr,
        )
    on_cpu = [pin, *(f"    --hash=sha256:{each}" for each in ON_CPU[pin])]
    common = [block for name, block in everything.items() if name not in build | torch]
    write("build.txt", *build.values())
    write("common.txt", "-r build.txt\n", *common)
    write("cpu.txt", "-r common.txt\n", " \\\n".join(on_cpu), "\n")
    write("default.txt", "-r common.txt\n", *torch.values())
    # what the rest takes on some systems alone, the extra may take on all
    beyond = [
        more[name] for name in more if name not in build and more[name] != everything.get(name)
    ]
    write("interop.txt", *beyond)


def write(lock: str, *blocks: str) -> None:
    (HERE / lock).write_text(
        "# Made by `make lock`; requirements/lock.py says how.\n" + "".join(blocks)
    )


if __name__ == "__main__":
    main(sys.argv[1:] == ["--upgrade"])
