"""All that can be known of a run before torch is imported, checked and read once."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cli.config.errors import UserError
from rlhf_cli.config.schema.stages import LabelConfig, Run
from rlhf_cli.config.selection_rules import only_drawn
from rlhf_cli.config.stages import STAGES, stage_name
from rlhf_cli.config.switches import written
from rlhf_cli.data.kinds import row_kind
from rlhf_cli.data.look import expected_rows
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.stdin import STDIN
from rlhf_cli.ranks.agreement import together
from rlhf_cli.ranks.environment import is_first, place
from rlhf_cli.ranks.worker import STDIN as PIPED
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import say
from rlhf_cli.reporting.trackers.about import check_packages
from rlhf_cli.runs.adapter_start import adapter_lines, check_adapter_use
from rlhf_cli.runs.attention import attention_lines, predicted_attention
from rlhf_cli.runs.begun import config_as_written
from rlhf_cli.runs.config_diff import flatten
from rlhf_cli.runs.data_checks import check_data, check_rows
from rlhf_cli.runs.fitting import sharing_lines
from rlhf_cli.runs.inherited import check_context, context_of, inherit
from rlhf_cli.runs.kinship import kinship_lines
from rlhf_cli.runs.machine_checks import check_labelling, check_questions, check_sampler
from rlhf_cli.runs.memory_estimate import in_bytes, predicted_memory
from rlhf_cli.runs.model_checks import check_frozen_layers, check_models
from rlhf_cli.runs.out_files import TASKS, is_claimed, what_is_kept
from rlhf_cli.runs.out_folder import FINISHED, FREE, RESUMABLE, state_of
from rlhf_cli.runs.plan_lines import (
    arithmetic_lines,
    auto_lines,
    own_loss_lines,
    reward_lines,
    sampler_lines,
)
from rlhf_cli.runs.provenance import Provenance, models_read, provenance_of, size_of_parents
from rlhf_cli.runs.rates import called, choose_rates, size_of
from rlhf_cli.runs.remote_code import code_lines
from rlhf_cli.runs.sharing import Ranks

HEAVY = 4 * 2**30  # bytes that take seconds to hash
NAMED = 4  # models in the line on what is loaded


@dataclass
class Plan:
    """What a run will do, and what was read to know it.

    state: of `out`: FREE, RESUMABLE or FINISHED, and then the rest is empty.
    rows: has read all local rows that the run needs.
    provenance: what the run is made from, as it was before rows were read; None of a check.
    doing, counted, code, memory: lines on the stage and its folder, on rows, on code that may run,
        on each part of the memory.
    loading: a line on what is loaded next, which takes seconds.
    parameters: of the model that the stage starts from; infinite where that is not known.
    sums: lines on rewards, batches, learning rates and products.
    """

    state: str
    rows: Rows
    provenance: Provenance | None
    doing: list[str]
    counted: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    loading: str = "loading PyTorch"
    parameters: float = 0.0

    def lines(self) -> list[str]:
        """Everything, for --check."""
        resumed = self.doing[2:]
        return [
            *(*self.doing[:2], *self.counted, *resumed),
            *(*self.code, *self.sums, *self.memory),
        ]

    def at_once(self) -> list[str]:
        """What is said before torch is imported; asked once more, nothing."""
        lines = [*self.doing, self.loading] if self.doing else []
        self.doing = []
        return lines

    def at_start(self) -> list[str]:
        """What a stage says as it starts; it counts the rows itself, once they are tokens."""
        return [*self.sums, *self.memory[-1:]]


def preflight(cfg: Run, check_only: bool = False, ranks: Ranks | None = None) -> Plan:
    """Check paths, checkpoint kinds, arithmetic and local rows of a typed config.

    Learning rates that it leaves open are filled in, so that config.yaml has them.

    Args:
        check_only: nothing will run, so that what it is made from need not be hashed, but to tell
            the state of `out`.
        ranks: that would share it; None for those that this command starts, or is one of.

    Raises:
        UserError: one line that says what is wrong, where, and what to do.
    """
    stage, out = stage_name(cfg), Path(cfg.out)
    _check_stdin(cfg)
    decides = is_first()
    taken = [*inherit(cfg), *choose_rates(cfg)]
    if not check_only and (size := size_of_parents(cfg)) > HEAVY:
        say(f"reading {in_bytes(size)} of weights, by whose hash stage.json names them")
    state = state_of(cfg, check_only) if decides else FREE  # what rank 0 finds counts: see `agree`
    rows = Rows(cfg.data)
    emptied = state == FREE and is_claimed(out)
    doing = [
        f"{stage}: {STAGES[stage].sentence}",
        f"out: {cfg.out} ({'made anew: what is there goes' if emptied else state})",
    ]
    if state == FINISHED:
        return Plan(state, rows, None, doing, loading=loading_line(cfg))
    check_packages(cfg.trackers)
    check_data(cfg)
    check_models(cfg)
    check_context(cfg, cfg.start, context_of(cfg))
    check_frozen_layers(cfg)
    check_sampler(cfg)
    check_labelling(cfg)
    check_questions(cfg)
    check_adapter_use(cfg)
    provenance: Provenance | None = {}
    if decides:
        # weights are read for it, at length
        provenance = None if check_only else provenance_of(cfg)
    counted = check_rows(cfg, rows)
    if check_only and _has_tokenizer(cfg):
        from rlhf_cli.runs.token_check import check_tokens  # a tokenizer takes long to import

        counted += check_tokens(cfg, rows)
    if state == RESUMABLE and (kept := what_is_kept(out)) is not None:
        doing.append(resumed_line(cfg, kept))
    parameters = 0.0 if cfg.start is None else size_of(cfg.start, called(cfg, cfg.start))
    sums = [*taken, *_sums(cfg, check_only, ranks)]
    memory = predicted_memory(cfg, expected_rows(rows.places(row_kind(cfg))), ranks=ranks)
    return Plan(
        *(state, rows, provenance, doing, counted, code_lines(cfg), sums, memory),
        loading=loading_line(cfg),
        parameters=math.inf if parameters is None else parameters,
    )


def _sums(cfg: Run, check_only: bool, ranks: Ranks | None) -> list[str]:
    """What a run is made of and how much it does, as far as its config and its folders tell."""
    return [
        *adapter_lines(cfg),
        *reward_lines(cfg),
        *own_loss_lines(cfg),
        *kinship_lines(cfg),
        *sampler_lines(cfg),
        *arithmetic_lines(cfg),
        *attention_lines(predicted_attention(cfg), cfg.model.attention),
        *(auto_lines(cfg) if check_only else []),  # a start tells what is found on its device
        *sharing_lines(cfg, ranks),
    ]


def loading_line(cfg: Run) -> str:
    """What is loaded before the first step, in a line."""
    if (Path(cfg.out) / TASKS).is_file() and is_claimed(Path(cfg.out)):
        return f"reading {Path(cfg.out) / TASKS}"
    if isinstance(cfg, LabelConfig) and only_drawn(cfg):
        return f"reading {cfg.samples}"
    models = dict.fromkeys(models_read(cfg).values())  # a policy is often its own baseline
    more = [f"{len(models) - NAMED} more"] if len(models) > NAMED else []
    return f"loading {', '.join(['PyTorch', *list(models)[:NAMED], *more])}"


def _has_tokenizer(cfg: Run) -> bool:
    """Whether there is one to ask: models that are not on this machine, or are made from scratch,
    have none yet.
    """
    return cfg.start is not None and Path(cfg.start, "tokenizer.json").is_file()


def _check_stdin(cfg: Run) -> None:
    """Of several processes each has a standard input of its own, and torchrun and srun fill one.

    Raises:
        UserError: rows are to come from it; our own agent has written them to a file.
    """
    own = place()
    if own is not None and own.size > 1 and cfg.data.path == STDIN and PIPED not in os.environ:
        raise UserError(
            f"data.path={STDIN}: several processes cannot read one standard input; give a file, or "
            "start them by hardware.processes"
        )


def agree(cfg: Run, plan: Plan) -> None:
    """Let a plan of one of several ranks say of `out` what that of rank 0 says.

    Raises:
        UserError: this rank was started with other settings than rank 0.
    """
    plan.state, plan.doing = world().from_main(plan.state), world().from_main(plan.doing)
    given = json.loads(json.dumps(config_as_written(cfg)))
    first = world().from_main(given)

    def check() -> None:
        ours, theirs = flatten(given), flatten(first)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name) and name != "hardware.device":
                raise UserError(
                    f"rank {world().rank} was started with {name}={written(ours.get(name))}, and "
                    f"rank 0 with {written(theirs.get(name))}: all ranks need the same command"
                )

    if plan.state != FINISHED:
        together(check)


def resumed_line(cfg: Run, kept: str) -> str:
    """What a run goes on from, in a line."""
    if cfg.trains:
        return f"newest resume point: {kept}"
    condition = ", if standard input is as it was" if cfg.data.path == STDIN else ""
    return f"goes on from {kept}{condition}"
