"""`rlhf-cli chat POLICY [POLICY]`: talk to what was made."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.hints import nearest
from rlhf_cli.reporting.terminal import printable

if TYPE_CHECKING:
    from rlhf_cli.config.schema.stages import GenerateConfig

USAGE = """\
rlhf-cli chat: talk to a policy, or to two side by side.

Usage: rlhf-cli chat POLICY [POLICY] [KEY=VALUE ...] [--json]

  POLICY        a policy of ours, or any folder or hub id of a language model
  reward=SPEC   what scores each answer: a reward model, a policy of dpo (its implicit reward), a
                rule or a function, as in ppo
  system=TEXT   a system prompt
  --json        a line of JSON for each answer

Other keys are those of generate: algo.temperature, algo.top_p, algo.max_tokens, algo.stop, seed,
data.template, data.chat_template, model.dtype, hardware.device and the like.

On a terminal /help names what may be typed beside messages: /again, /undo, /system, /save, ...
Ctrl-C ends an answer, Ctrl-D the dialogue. From a pipe each line is a message, and Ctrl-C ends all:

  echo "Say hello to Anna." | rlhf-cli chat runs/demo/ppo"""

TOKENS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_tokens", "max_tokens"),
    "stop",
)
READ = (
    *("reward", "reward_timeout", "seed", "hardware.device", "hardware.threads", "data.template"),
    *("data.chat_template", "data.chat_args", "data.special_tokens", "data.step_end"),
    *("data.max_prompt_tokens", "data.max_response_tokens"),
    *("model", "model.dtype", "model.trust_remote_code", "model.attention"),
    *(f"algo.{name}" for name in TOKENS),
)
"""The keys of generate that an answer depends on."""
MOST = 2  # policies
# messages come from elsewhere; what is written to `out` of generate is not written here
ALWAYS = ("data=rows", "data.path=-")


@dataclass
class Order:
    """What the words ask for."""

    policies: list[str]
    overrides: list[str]
    system: str
    json: bool


def run(words: list[str]) -> None:
    """Talk until standard input ends, or /bye.

    Raises:
        UserError: a word, a policy or a reward is wrong.
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    order = parse(words)
    configs = [config_of(policy, order.overrides) for policy in order.policies]
    typed = sys.stdin is not None and sys.stdin.isatty()
    print(f"loading PyTorch, {', '.join(order.policies)}", file=sys.stderr, flush=True)
    from rlhf_cli.reporting.console import say
    from rlhf_cli.views.chat import Chat
    from rlhf_cli.views.chat_screen import shown_as
    from rlhf_cli.views.speaker import Speaker

    if typed:  # from a pipe nobody would be asked for the next message: it ends all
        signal.signal(signal.SIGINT, signal.default_int_handler)
    speakers: list[Speaker] = []
    for policy, cfg in zip(order.policies, configs, strict=True):
        speakers.append(Speaker(policy, cfg, speakers[0].reward if speakers else None))
        say(speakers[-1].how)
    shown = shown_as(len(speakers), order.json)
    chat = Chat(speakers, shown, configs[0].algo.temperature, order.system)
    if typed:
        say("Ctrl-D ends, Ctrl-C ends an answer, /help names the rest")
    for line in lines_typed() if typed else lines_piped():
        if not chat.take(line):
            return


def parse(words: list[str]) -> Order:
    """Policies, keys and flags.

    Raises:
        UserError: there is no policy or too many, or a key that nothing here reads.
    """
    order = Order([], [], "", False)
    for word in words:
        key, equals, value = word.partition("=")
        if word == "--json":
            order.json = True
        elif word.startswith("-"):
            raise UserError(f"chat: unknown flag {word}; see rlhf-cli chat --help")
        elif not equals or Path(word).is_dir():  # as the jobs of a sweep are called
            order.policies.append(word)
        elif key == "system":
            order.system = value
        elif key in READ:
            order.overrides.append(word)
        else:
            hint = nearest(key, ["system", *READ])
            raise UserError(f"chat: nothing here reads {key}{hint or '; see rlhf-cli chat --help'}")
    if not order.policies:
        raise UserError("chat takes a policy: rlhf-cli chat runs/demo/ppo, or two side by side")
    if len(order.policies) > MOST:
        raise UserError(f"chat takes one policy or two, got {len(order.policies)}")
    return order


def config_of(policy: str, overrides: list[str]) -> "GenerateConfig":
    """The config of `generate` from a policy, with what it was trained with filled in.

    Prompts may be as long as its positions allow, not just as those of its training.

    Raises:
        UserError: a value is wrong, or there is no such policy.
    """
    from rlhf_cli.config.compose import compose
    from rlhf_cli.runs.inherited import inherit
    from rlhf_cli.runs.model_checks import check_models

    cfg: GenerateConfig = compose("generate", [*ALWAYS, *overrides, f"policy={policy}"])
    given = cfg.data.max_prompt_tokens
    inherit(cfg)
    cfg.data.max_prompt_tokens = given
    check_models(cfg)
    return cfg


def lines_typed() -> Iterator[str]:
    """What somebody types, until Ctrl-D."""
    import readline  # noqa: F401  input() edits lines with it, and has those before

    while True:
        try:
            yield input("\n> ")
        except KeyboardInterrupt:
            print("\nCtrl-D ends", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def lines_piped() -> Iterator[str]:
    """The lines of standard input; one of these that is no text is shown as far as it is."""
    if sys.stdin is None:
        raise UserError("chat: standard input is closed, so nothing is said")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for line in sys.stdin:
        yield printable(line.rstrip("\n"), keep="\t")
