"""`rlhf-cli rounds EVALUATION...`: which policy the next round labels, or that none is needed."""

from pathlib import Path

from rlhf_cli.config.errors import UserError

USAGE = """\
rlhf-cli rounds: what each round of labels and training has gained over the one before it.

Usage: rlhf-cli rounds EVALUATION ...

  EVALUATION  a folder of `rlhf-cli evaluate` for each round, oldest first: its policy is that of
              the round, its reference what rounds start from, its baselines the policies before

Standard output has the best policy so far, for the next round to label; and nothing once two rounds
running have not gained: the 95% interval of wins over the round before includes 50%, or lies below.
"""


def run(words: list[str]) -> None:
    """Show a table on stderr; print the best policy, or nothing where rounds have settled.

    Raises:
        UserError: a folder is no evaluation of a round, or there is none.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE, end="")
        return
    folders = parse(words)
    from rlhf_cli.reporting.console import say, table
    from rlhf_cli.runs.rounds import PATIENCE, has_settled, read_rounds

    rounds = read_rounds(folders)
    lines = [
        [number, each.policy, f"{each.share:.2f} ({each.low:.2f} to {each.high:.2f})", each.before]
        for number, each in enumerate(rounds, 1)
    ]
    table("", ["round", "policy", "wins, 95 %", "over"], lines)
    best = rounds[-1].best
    if has_settled(rounds):
        say(f"rounds: the last {PATIENCE} have gained nothing; the best policy is {best}")
    else:
        print(best)


def parse(words: list[str]) -> list[Path]:
    """The folders.

    Raises:
        UserError: there is none, or a flag.
    """
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"rounds: unknown flag {flags[0]}; see rlhf-cli rounds --help")
    if not words:
        raise UserError("rounds takes evaluations: rlhf-cli rounds runs/NAME/round1/evaluate ...")
    return [Path(word) for word in words]
