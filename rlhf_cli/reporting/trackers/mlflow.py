"""MLflow: to the server or store that MLFLOW_TRACKING_URI names, else to its own default."""

import os
import posixpath
import re
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)

from rlhf_cli.reporting.trackers.about import COLUMNS, SAMPLES, About, Sample, leaves

ID = "rlhf_cli.run"  # a tag, by which a run is found again
REFUSED = re.compile(r"[^\w\-. :/]")  # in names


def begun(about: About) -> "Mlflow":
    """A run of MLflow, or the same one again."""
    return Mlflow(about)


class Mlflow:
    """Metrics, the settings as parameters, what it was made from as tags, samples as files."""

    def __init__(self, about: About) -> None:
        self._client, self._step = MlflowClient(), 0
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or about.project)
        known = self._client.search_runs([experiment], f"tags.`{ID}` = '{about.id}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            self._run = self._client.create_run(experiment, run_name=about.name).info.run_id
            self._describe(about)
        self.place = f"run {self._run} at {self._client.tracking_uri}"

    def _experiment(self, name: str) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        known = self._client.get_experiment_by_name(name)
        return known.experiment_id if known else self._client.create_experiment(name)

    def _describe(self, about: About) -> None:
        made_from = {
            f"{kind}.{role}": f"{entry['path']} ({entry['hash']})"
            for kind, entries in about.lineage.items()
            for role, entry in entries.items()
        }
        told = {ID: about.id, MLFLOW_RUN_NOTE: about.command, "stage": about.stage, **made_from}
        tags = [RunTag(accepted(name), text) for name, text in told.items()]
        params = [
            Param(accepted(name), str(value)[:MAX_PARAM_VAL_LENGTH])
            for name, value in leaves(about.config, ".")
        ]
        self._client.log_batch(self._run, tags=tags)
        for first in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            some = params[first : first + MAX_PARAMS_TAGS_PER_BATCH]
            self._client.log_batch(self._run, params=some)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Metrics; where a name has characters that MLflow refuses, _ stands in their place."""
        self._step, now = step, round(time.time() * 1000)
        metrics = [Metric(accepted(name), value, now, step) for name, value in figures.items()]
        for first in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            some = metrics[first : first + MAX_METRICS_PER_BATCH]
            self._client.log_batch(self._run, metrics=some)

    def show(self, step: int, samples: list[Sample]) -> None:
        """A file of each step that shows some."""
        rows = [dict(zip(COLUMNS, sample, strict=True)) for sample in samples]
        self._client.log_dict(self._run, {"rows": rows}, f"{SAMPLES}/step-{step:08d}.json")

    def end(self, figures: Mapping[str, float] | None) -> None:
        """Metrics at the last step; a run without an end has failed."""
        if figures:
            self.log(self._step, figures)
        status = RunStatus.FAILED if figures is None else RunStatus.FINISHED
        self._client.set_terminated(self._run, RunStatus.to_string(status))


def accepted(name: str) -> str:
    """A name as MLflow takes it: plain characters, and as a path the shortest."""
    plain = posixpath.normpath(REFUSED.sub("_", name)).strip("/")
    return plain[-MAX_ENTITY_KEY_LENGTH:].strip("/")
