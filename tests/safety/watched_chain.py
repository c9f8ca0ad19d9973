"""Every stage in one process that is watched: what it unpickles, and what it opens for reading.

Run as a script in a folder with rows; it leaves watched.json there. Before each stage but the first
all folders get malicious pickles beside what is read.
"""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from rlhf_cli.cli import main
from tests.tiny import DATA, WORDS, words_of

MARKER = "IT_RAN"
PLANTED = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "x.pkl")
SHORT = ["algo.steps=2", "algo.epochs=1", "hardware.save_every=1"]
ONCE = ["algo.epochs=1"]
SAMPLING = [*DATA, "algo.prompts=4", "algo.max_tokens=8"]
SWEEP = ["algo.beta=0.1,0.2", "out=runs/demo/sweep", *ONCE]
ITERATIVE = ["algo=grpo_iterative", "algo.refresh_reward=1", "reward=runs/demo/reward"]
LORA_PPO = [*WORDS["lora"], "reward=runs/demo/reward_adapter", "policy=runs/demo/adapter"]
COMMANDS = [
    ["sft", *words_of("sft")],
    ["reward", *words_of("reward"), *ONCE],
    ["reward", *words_of("reward"), *ONCE, *WORDS["lora"], "out=runs/demo/reward_adapter"],
    ["dpo", *words_of("dpo"), *ONCE, "algo.precompute_reference=true"],
    ["dpo", *words_of("dpo"), *ONCE, *WORDS["lora"], "out=runs/demo/adapter"],
    ["dpo", *words_of("dpo"), *ONCE, "reference=bootstrap", "out=runs/demo/boot"],
    ["dpo", "-m", *words_of("dpo"), *SWEEP],
    ["ppo", *words_of("ppo"), *SHORT],
    ["ppo", *words_of("ppo"), *SHORT, *LORA_PPO, "out=runs/demo/ppo_adapter"],
    ["grpo", *words_of("grpo"), *SHORT, "reward=mine.py:length"],
    ["grpo", *words_of("grpo"), *SHORT, *ITERATIVE, "judge=regex:Hi", "out=runs/demo/iterative"],
    ["generate", *SAMPLING, "policy=runs/demo/adapter", "reward=runs/demo/dpo"],
    ["evaluate", *SAMPLING, "gold=length:2"],
    ["ls", "runs"],
]
REWARD = "def length(prompts, responses):\n    return [len(each) for each in responses]\n"


class Malicious:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (MARKER, "w")


def plant() -> None:
    """Malicious pickles in every folder below.

    An unfinished run's own gets none, but for its resume points: what lies there when it ends is
    hashed, whatever it is.
    """
    folders = [Path(), *(path for path in Path().rglob("*") if path.is_dir())]
    for folder in folders:
        if (folder / "checkpoints").is_dir():
            continue
        for name in PLANTED:
            (folder / name).write_bytes(pickle.dumps(Malicious()))


def unplant() -> None:
    """What was planted goes, so that what is left was written by the stages."""
    for name in PLANTED:
        for file in Path().rglob(name):
            file.unlink()


def interrupted(words: list[str]) -> None:
    """Run a stage up to its end, and lose it there: resume points are left."""
    from rlhf_cli.runs.session import Session

    finish = Session.finish
    Session.finish = lambda *_, **__: os._exit(3)  # type: ignore[method-assign]
    child = os.fork()
    if child == 0:
        run(words)
    os.waitpid(child, 0)
    Session.finish = finish  # type: ignore[method-assign]
    assert list(Path("runs/demo/ppo/checkpoints").glob("step-*"))


def run(words: list[str]) -> int:
    sys.argv = ["rlhf-cli", *words]
    return main()


def watched() -> dict[str, Any]:
    """Run all commands; what was unpickled, which pickles were opened, and each exit status."""
    unpickled: list[str] = []
    opened: list[str] = []
    watching = False

    def look(event: str, args: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event == "pickle.find_class":
            unpickled.append(".".join(map(str, args[:2])))
        elif event == "open" and str(args[0]).endswith(PLANTED):
            opened.append(str(args[0]))

    sys.addaudithook(look)
    Path(PLANTED[0]).touch()
    watching = True  # what is watched for is seen, as these two show
    pickle.loads(pickle.dumps(Path))
    Path(PLANTED[0]).read_bytes()
    watching = False
    statuses = []
    for words in COMMANDS:
        if words[0] == "ppo" and not Path("runs/demo/ppo").exists():
            interrupted(words)
        plant()
        watching = True
        statuses.append(run(words))
        watching = False
        unplant()
    return {"unpickled": unpickled, "opened": opened, "statuses": statuses}


if __name__ == "__main__":
    os.umask(0o027)
    Path("mine.py").write_text(REWARD)
    found = watched()
    Path("watched.json").write_text(json.dumps(found))
