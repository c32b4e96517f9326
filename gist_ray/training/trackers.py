"""Trackers: MLflow and Weights & Biases, each as a run that can be continued and takes scalars by step."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from gist_ray.config import MlflowConfig, Recipe, WandbConfig

# MLflow's limits: https://mlflow.org/docs/latest/rest-api.html#request-limits
_METRICS_A_REQUEST, _PARAMS_A_REQUEST, _PARAM_CHARS, _NAME_CHARS = 1000, 100, 6000, 250
# Its own seven retries take minutes, in which the driver could not end; whoever calls tries again.
_MLFLOW_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """One place that metrics are sent to. Any method but `place` may raise whatever its package raises."""

    name: str
    """Section of `tracking` in the recipe."""
    package: str
    """What to install with pip."""

    def place(self) -> str:
        """Server and experiment, without credentials. A run is only continued where it was."""

    def check(self) -> None:
        """Reach the server as this user; change nothing there."""

    def open(self, run: str | None, run_dir: Path) -> str:
        """Continue a run, or start one where that is None or unknown; return its id."""

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        """Take the scalars of some steps."""

    def close(self, succeeded: bool) -> None:
        """The run has ended."""


def trackers_of(recipe: Recipe) -> list[Tracker]:
    """The trackers that a recipe names. Their packages are imported when they are used."""
    tracking = recipe.tracking
    trackers: list[Tracker] = []
    if tracking.mlflow:
        trackers.append(_Mlflow(tracking.mlflow, recipe))
    if tracking.wandb:
        trackers.append(_Wandb(tracking.wandb, recipe))
    return trackers


class _Mlflow:
    name, package = "mlflow", "mlflow-skinny"

    def __init__(self, config: MlflowConfig, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        self._run: str | None = None

    def place(self) -> str:
        uri = self._config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "its default store")
        return f"MLflow at {without_password(uri)}, experiment {self._config.experiment}"

    def check(self) -> None:
        self._connected().get_experiment_by_name(self._config.experiment)

    def open(self, run: str | None, run_dir: Path) -> str:
        client = self._connected()
        found = self._found(run or self._run)
        if found is None:
            experiment = client.get_experiment_by_name(self._config.experiment)
            place = experiment.experiment_id if experiment else client.create_experiment(self._config.experiment)
            found = client.create_run(place, run_name=self._recipe.name)
        else:
            client.update_run(found.info.run_id, status="RUNNING")
        self._run = found.info.run_id  # kept also if the parameters fail: the next try must not start another run
        self._log_params(found.data.params)
        return self._run

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_mlflow_name(name), value, now, step) for step, numbers in lines for name, value in numbers.items()
        ]
        for start in range(0, len(metrics), _METRICS_A_REQUEST):
            self._client.log_batch(self._run, metrics=metrics[start : start + _METRICS_A_REQUEST])

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")

    def _connected(self) -> Any:
        for variable, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=self._config.tracking_uri)
        return self._client

    def _found(self, run: str | None) -> Any:
        """A run to continue; None where there is none, or where somebody has deleted it."""
        from mlflow.exceptions import MlflowException

        if run is None:
            return None
        try:
            found = self._client.get_run(run)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _log_params(self, known: dict[str, str]) -> None:
        """Log what a run does not have yet: MLflow refuses to change a value, and a resumed run may differ."""
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in flat_params(self._recipe).items() if name not in known]
        for start in range(0, len(params), _PARAMS_A_REQUEST):
            self._client.log_batch(self._run, params=params[start : start + _PARAMS_A_REQUEST])


class _Wandb:
    name, package = "wandb", "wandb"

    def __init__(self, config: WandbConfig, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        self._run: str | None = None

    def place(self) -> str:
        owner = f"{self._config.entity}/" if self._config.entity else ""
        return f"Weights & Biases, project {owner}{self._config.project}"

    def check(self) -> None:
        import wandb

        if self._config.mode == "online" and not wandb.login(verify=True):
            raise ValueError("no credentials; set WANDB_API_KEY, or tracking.wandb.mode to offline")

    def open(self, run: str | None, run_dir: Path) -> str:
        import wandb

        self._run = run or self._run or secrets.token_hex(4)
        self._writer: Any = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._recipe.name,
            id=self._run,
            resume="allow",
            reinit="create_new",  # a run that the calling program has open is not ours to write to
            mode=self._config.mode,
            dir=str(run_dir),
            config=_tree(self._recipe),
            settings=wandb.Settings(silent=True, console="off", init_timeout=20),
        )
        # Not W&B's own step: it cannot go on from where an earlier writer of this run stopped sending.
        self._writer.define_metric("*", step_metric="step")
        return self._run

    def send(self, lines: list[tuple[int, dict[str, float]]]) -> None:
        for step, numbers in lines:
            self._writer.log({"step": step, **numbers})

    def close(self, succeeded: bool) -> None:
        self._writer.finish(exit_code=0 if succeeded else 1)


def flat_params(recipe: Recipe) -> dict[str, str]:
    """A recipe as MLflow takes it: `train.batch_size` and so on, within its limits on names and lengths.

    A list is one value, in JSON: a recipe may have thousands of sources. `tracking` is left out, as nothing of the
    result depends on it.
    """
    params: dict[str, str] = {}

    def flatten(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(f"{place}.{name}" if place else str(name), inner)
        else:
            text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            params[_mlflow_name(place)] = text[:_PARAM_CHARS]

    flatten("", _tree(recipe))
    return params


def _mlflow_name(name: str) -> str:
    """A name of ours as MLflow takes it: names of tasks and of DeepSpeed's settings are free."""
    parts = (re.sub(r"[^\w\-.: ]", "_", part) for part in name[:_NAME_CHARS].split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_NAME_CHARS]


def _tree(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"tracking"})


def without_password(text: str) -> str:
    """A text without the credentials that an address in it may hold."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)
