"""One run of one stage: its folder, device, logs, resume point, checks and manifest."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import rlhf_cli
from rlhf_cli.config.errors import Interrupted, RunError
from rlhf_cli.config.schema.stages import Run
from rlhf_cli.config.stages import stage_name
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.items import Judged
from rlhf_cli.data.kinds import row_kind
from rlhf_cli.data.look import expected_rows
from rlhf_cli.data.rows import Rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.folders.files import library_errors, seal_whole, whole_folder
from rlhf_cli.folders.manifest import Manifest
from rlhf_cli.models.adapters import restore, trained
from rlhf_cli.models.attention import attention_of
from rlhf_cli.models.dtypes import product_type_of, products_of
from rlhf_cli.models.mapped import remove_written
from rlhf_cli.models.shards import is_sharded
from rlhf_cli.models.towers import told_of_towers
from rlhf_cli.ranks.agreement import by_main, together
from rlhf_cli.ranks.world import world
from rlhf_cli.reporting.console import Bar, board, say
from rlhf_cli.reporting.live import Course
from rlhf_cli.reporting.metrics import JsonLines, Listener, defined, round_figures
from rlhf_cli.reporting.trackers.outlets import Trackers
from rlhf_cli.runs import interrupts, written_model
from rlhf_cli.runs.attention import attention_lines, predicted_attention
from rlhf_cli.runs.begun import begun_with
from rlhf_cli.runs.budgets import Budget, keep
from rlhf_cli.runs.cost import cost_of
from rlhf_cli.runs.lock import check_lock
from rlhf_cli.runs.memory_estimate import predicted_memory
from rlhf_cli.runs.model_sizes import BYTES
from rlhf_cli.runs.out_files import drop_snapshots, snapshot
from rlhf_cli.runs.out_folder import claim, publish, staging
from rlhf_cli.runs.preflight import Plan
from rlhf_cli.runs.progress_file import ProgressFile
from rlhf_cli.runs.resume_points import load_checkpoint, save_checkpoint
from rlhf_cli.runs.run_data import RunData
from rlhf_cli.runs.same_weights import require_same
from rlhf_cli.runs.step_summary import append_summary
from rlhf_cli.runs.summary import last_lines
from rlhf_cli.runs.tracking import about_run
from rlhf_cli.runs.weights import all_weights, tensors_of, trained_weights, wanted_by
from rlhf_cli.training.optimize import Optimizer

METRICS = "metrics.jsonl"
FEW = 10  # held-out rows
ALONE = [1, 1]  # ranks, and those over which weights are sharded: one process

interrupts.before_the_end(remove_written)


@dataclass
class Session:
    """What a stage holds while it runs.

    `out` is untouched until `claim`, so that a bad row or model leaves it as it was.

    plan: what preflight found, and the rows that it read.
    start: the step to go on after; 0 for a fresh run.
    last_step: the one that it is planned to end with.
    step_began: when the step that is under way did, on the clock.
    spent, saving: seconds that earlier parts of a resumed run took, and that resume points did.
    saved: seconds on the clock at the last resume point, or where training began.
    checks: measured values of the hand-off checks, for stage.json.
    data: rows, tokenised and dealt to steps.
    budget: of a GPU, where hardware says auto.
    listeners: are told of each row of the logs.
    course: what a terminal shows of them; None where nobody looks on.
    trackers: hear them, too, and of the end; None where none is asked for.
    """

    cfg: Run
    out: Path
    device: torch.device
    began: float
    plan: Plan
    start: int = 0
    last_step: int = 0
    step_began: float = 0.0
    spent: float = 0.0
    saving: float = 0.0
    saved: float = 0.0
    claimed: bool = False
    logs: list[JsonLines] = field(default_factory=list)
    log_sizes: dict[str, int] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    listeners: list[Listener] = field(default_factory=list)
    course: Course | None = None
    trackers: Trackers | None = None
    data: RunData = field(init=False)

    def __post_init__(self) -> None:
        self.data = RunData(self.cfg, self.rows)
        if self.cfg.trackers and world().is_main:
            self.trackers = Trackers(self.cfg.trackers)
            self.listeners.append(self.trackers.hear)

    @property
    def rows(self) -> Rows:
        """The rows of cfg.data, each file read once."""
        return self.plan.rows

    def require(self, name: str, value: float, holds: bool, diagnosis: str) -> None:
        """Record a hand-off check; stop the run where it does not hold."""
        self.checks[name] = value
        if not holds:
            raise RunError(f"hand-off check {name} failed ({value:.6g}): {diagnosis}")

    def note(self, notes: list[str], data: Dataset | None = None) -> None:
        """Say what will happen, and how many rows were read, cut and dropped, and why.

        Args:
            data: what is left to learn from and held out, where that is worth a line.
        """
        left = []
        if data is not None and isinstance(data.train, Sized):
            left = [f"{len(data.train)} rows to learn from, {len(data.held_out)} held out"]
            if len(data.held_out) < FEW:
                left[0] += ": few to judge by; data.eval_share or data.eval_path gives more"
        for line in [*self.plan.at_start(), *notes, *left]:
            say(line)

    def introduce(self, model: nn.Module) -> None:
        """Say of a loaded model what could not be told before.

        Attention that takes memory, and towers that see and are not trained.
        """
        self.plan.sums += told_of_towers(model) if self.cfg.trains else []
        actual = attention_of(model)
        if other := actual != predicted_attention(self.cfg):
            self.plan.sums += attention_lines(actual, self.cfg.model.attention)
        width = product_type_of(model).itemsize
        if other or width < BYTES or self.budget is not None:
            count = expected_rows(self.rows.places(row_kind(self.cfg)))
            self.plan.memory = predicted_memory(self.cfg, count, actual, width)

    def claim(self) -> None:
        """Make `out` this run's own, once all input is known to be good; writing starts here."""
        if not self.claimed:
            by_main(self._claim)
        self.claimed = True

    def _claim(self) -> None:
        assert self.plan.provenance is not None  # a finished or checked run has no session
        claim(self.cfg, self.plan.provenance)
        board.heard_by = ProgressFile(self.out)
        if self.budget is not None:
            keep(self.budget, self.out)
        if self.trackers is not None:
            self.trackers.start(about_run(self.cfg))

    def log(self, file: str = METRICS) -> JsonLines:
        """A JSON-lines file in `out`, cut back to the resume point; all ranks have its metrics."""
        size = self.log_sizes.get(file, 0)
        log = together(
            lambda: JsonLines(
                self.out / file,
                size,
                lambda: check_lock(self.out),
                alike=file == METRICS,
                agreed=True,
                heard_by=self.listeners,
            )
        )
        self.logs.append(log)
        if self.course is not None:
            for row in log.rows():  # up to the resume point
                self.course.hear(file, row)
        return log

    def steps(self, bar: Bar) -> Iterator[int]:
        """The steps that are left to do, counted from 1 to the bar's total.

        The bar counts a step as it begins, so that what a stage says at its end stands beside it.
        """
        bar.skip(self.start)
        self.last_step = bar.total
        every = getattr(self.cfg.algo, "snapshot_every", None)
        if every is not None and every > bar.total:
            say(
                f"note: algo.snapshot_every={every}, but the run has {bar.total} steps: no policy "
                "is kept on its way"
            )
        by_main(lambda: drop_snapshots(self.out, self.start))
        for step in range(self.start + 1, bar.total + 1):
            bar.advance()
            self.step_began = time.monotonic()
            yield step

    def cost(self, items: Sequence[Judged]) -> dict[str, float]:
        """tokens_per_second and peak_memory of the step that has learnt from these items just now;
        what follows, as an evaluation, takes none of its time.
        """
        return cost_of(items, time.monotonic() - self.step_began, self.device)

    def seconds(self) -> float:
        """Working time, of earlier parts of a resumed run too."""
        return self.spent + time.monotonic() - self.began

    def snapshot(
        self,
        step: int,
        model: nn.Module,
        encoder: Encoder,
        as_written: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Keep the policy as it would be written now, where algo.snapshot_every says so.

        Args:
            as_written: within it the model is that policy, where it is not while it learns.
        """
        every = self.cfg.algo.snapshot_every  # type: ignore[attr-defined]
        if every is None or step % every:
            return
        began = time.monotonic()
        with as_written():
            written_model.require_finite(trained(model), f"after step {step}")
            with written_model.gathered(self.cfg, model):
                by_main(lambda: self._write_snapshot(step, model, encoder))
        self.saving += time.monotonic() - began

    def _write_snapshot(self, step: int, model: nn.Module, encoder: Encoder) -> None:
        check_lock(self.out)
        with whole_folder(snapshot(self.out, step, self.last_step)) as part:
            identity = written_model.write(self.cfg, model, "policy", encoder, part, rounds=False)
            seal_whole(part, self._described("policy", **identity, step=step))
            check_lock(self.out)

    # ------------------------------------------------------------------ resume points

    def save(
        self,
        step: int,
        networks: dict[str, nn.Module],
        optimizer: Optimizer,
        state: dict[str, Any],
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Keep a resume point if it is time for one, or if a signal asked for the end.

        Raises:
            Interrupted: a signal did, on any rank; everything up to this step is saved.
            RunError: something is not finite, or not the same on all ranks. It is not saved; the
                resume point before is whole.
        """
        asked = interrupts.asked()
        if asked is None and not self._is_time(step):
            return
        began = time.monotonic()
        require_same(trained_weights(networks), f"after step {step}")
        tensors = trained_weights(networks)
        tensors |= {f"optimizer/{name}": value for name, value in optimizer.tensors().items()}
        tensors |= {f"extra/{name}": value for name, value in (extra or {}).items()}
        written_model.require_finite(tensors, f"after step {step}")
        own = {
            "products": products_of(next(iter(networks.values()))),
            "seconds": self.seconds(),
            "saving": self.saving,
            "checks": self.checks,
            "logs": {log.file.name: log.described() for log in self.logs},
        }
        if (placed := _placed(networks)) != ALONE:
            own["placed"] = placed
        keep = self.cfg.hardware.keep_checkpoints
        assert keep is not None  # validate() asks for it where a stage trains
        if self.data.stream is not None:
            own["stream"] = self.data.stream.state()
        save_checkpoint(self.out, step, tensors, {**state, **optimizer.state(), **own}, keep)
        self.saved = time.monotonic()
        self.saving += self.saved - began
        if asked is not None:
            raise Interrupted(f"{asked}: saved after step {step}; the same command goes on")

    def _is_time(self, step: int) -> bool:
        """Whether hardware.save_every says steps or minutes, and they have passed."""
        every = self.cfg.hardware.save_every
        if every is None:
            return False
        if every.endswith("min"):  # by the clock of rank 0
            passed = time.monotonic() - self.saved >= 60 * int(every.removesuffix("min"))
            return world().from_main(passed)
        return step % int(every) == 0

    def resume(
        self, networks: dict[str, nn.Module], optimizer: Optimizer
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Claim `out` and load its newest resume point into networks and optimizer.

        Returns:
            The state and the extra tensors that were given to `save`; empty for a fresh run.
        """
        self.claim()
        interrupts.wait_for_steps()
        self.saved = time.monotonic()
        newest = load_checkpoint(self.out, wanted_by(networks))
        if newest is None:
            if self.budget is not None:
                optimizer.room.start_at(self.budget.level)
            require_same(all_weights(networks), "at the start")
            return {}, {}
        tensors, state = newest
        for name, network in networks.items():
            restore(network, tensors_of(tensors, name))
        optimizer.load(tensors_of(tensors, "optimizer"), state)
        self.start = state["step"]
        self.spent, self.saving = state["seconds"], state["saving"]
        self.checks = state["checks"]
        if self.data.stream is not None:
            self.data.stream.load(state["stream"])
        self.log_sizes = {name: entry["size"] for name, entry in state["logs"].items()}
        say(f"resuming after step {self.start}")
        require_same(all_weights(networks), f"after step {self.start}, where they go on")
        _note_ranks(state.get("placed", ALONE), _placed(networks))
        before, now = state.get("products"), products_of(next(iter(networks.values())))
        if before not in (None, now):
            say(f"note: matrix products were {before} up to there and are {now} from here on")
        return state, tensors_of(tensors, "extra")

    # ------------------------------------------------------------------ the end

    def settle(self, model: nn.Module) -> None:
        """Round what was trained to the type in which it is written, before it is measured."""
        written_model.settle(self.cfg, model)

    def finish_model(
        self,
        model: nn.Module,
        kind: str,
        encoder: Encoder,
        metrics: dict[str, float],
        write_beside: Callable[[Path], None] = lambda folder: None,
        **more: Any,
    ) -> Path:
        """Write the model folder and its manifest; only then is the stage complete.

        Args:
            write_beside: writes further files into the folder.
            more: further entries of stage.json.
        """
        written_model.require_finite(trained(model), "at the end")
        with written_model.gathered(self.cfg, model):
            identity = by_main(lambda: self._write_model(model, kind, encoder, write_beside))
        if self.data.stream is not None:
            for line in self.data.stream.notes():
                say(f"of the rows that were streamed: {line}")
        return self.finish(kind, metrics, **identity, **more)

    def _write_model(
        self, model: nn.Module, kind: str, encoder: Encoder, write_beside: Callable[[Path], None]
    ) -> dict[str, Any]:
        """Write the model folder aside; returns what stage.json says of it."""
        folder = staging(self.out)
        try:
            with library_errors(folder):
                identity = written_model.write(self.cfg, model, kind, encoder, folder)
            write_beside(folder)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # a full disk has room again
            raise
        return identity

    def finish(
        self, kind: str, metrics: dict[str, Any], told: str | None = None, **more: Any
    ) -> Path:
        """Publish what is staged, with stage.json last, and say how it went.

        Args:
            told: a sentence on that, where summary.py does not know one.
            more: further entries of stage.json.
        """
        known, reasons = defined(metrics)
        if reasons:
            more["undefined"] = reasons
        by_main(lambda: self._publish(kind, known, more))
        for line in by_main(lambda: self._last_lines(known, told)):
            say(line)
        saving = f", {self.saving:.1f} s of it saving" if self.saving >= 1 else ""
        say(f"{stage_name(self.cfg)}: wrote {self.out} in {self.seconds():.1f} s{saving}")
        if self.trackers is not None:
            self.trackers.finish(known)
        return self.out

    def _last_lines(self, metrics: dict[str, Any], told: str | None) -> list[str]:
        """How it went, for the page of a CI job too; from the files of `out`, which may lie on the
        disk of rank 0 alone.
        """
        rows = self.logs[0].rows() if self.logs else []
        lines = last_lines(self.cfg, metrics, rows, told)
        append_summary(self.cfg, lines, metrics, rows)
        return lines

    def _publish(self, kind: str, metrics: dict[str, Any], more: dict[str, Any]) -> None:
        for log in self.logs:
            log.described()  # so that it is on disk before stage.json says that all is there
        figures = {"checks": round_figures(self.checks), "metrics": round_figures(metrics)}
        publish(self.out, self._described(kind, **more, **figures))

    def _described(self, kind: str, **more: Any) -> Manifest:
        """What stage.json says of a folder that this run writes."""
        return {
            "stage": stage_name(self.cfg),
            "kind": kind,
            **begun_with(self.out),
            "seed": self.cfg.seed,
            **more,
            "seconds": round(self.seconds(), 1),
            "versions": {
                "rlhf-cli": rlhf_cli.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def _placed(networks: Mapping[str, nn.Module]) -> list[int]:
    """How many ranks train networks, and over how many of them weights are sharded, frozen ones
    included.
    """
    sharded = any(map(is_sharded, all_weights(networks).values()))
    return [world().size, world().mesh.size(-1) if sharded else 1]


def _note_ranks(before: list[int], now: list[int]) -> None:
    """Say where a run goes on on other ranks than before: sums are rounded otherwise there."""
    if before == now:
        return
    told = [
        f"{size} process{'es' * (size > 1)}{f', sharded over {over}' * (over > 1)}"
        for size, over in (before, now)
    ]
    say(
        f"note: this run was on {told[0]} up to there and is on {told[1]} from here on: it ends "
        "equal up to rounding, not to the last bit"
    )
