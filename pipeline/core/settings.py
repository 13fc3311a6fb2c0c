"""YAML files in ``conf/`` in, frozen settings out; an unknown or wrong key names the key and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)

CONF = Path("conf")
"""Folder of the default configuration, relative to the project's folder."""

CONF_VARIABLE = "CREDIT_RISK_CONF"
"""Environment variable that names another folder of configuration for the service."""

MODEL_NAME = "credit_risk_model"
"""The registered model in MLflow and the model in the BentoML store."""


DECISION_FILE = "decisions-{}.jsonl"
"""Name of a file of the decision log: the placeholder holds the worker's number and, once rotated, the file's."""


class Settings(BaseModel):
    """Base of all settings: strict, frozen, and every key known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **flags: Any) -> Self:
        """Read a YAML file, lay command-line flags over it, and validate both.

        Parameters
        ----------
        path
            The YAML file.
        **flags
            Values that win over the file's; ``None`` means "not given".

        Raises
        ------
        ConfigError
            The file is absent, is no YAML mapping, or a key is unknown or has a wrong value.
        """
        given = {key: value for key, value in flags.items() if value is not None}
        return parse_settings(cls, {**read_yaml(path), **given}, source=str(path))


Parameter = Literal[
    "eta", "max_depth", "max_leaves", "min_child_weight", "max_delta_step", "gamma", "subsample",
    "colsample_bytree", "colsample_bylevel", "colsample_bynode", "reg_lambda", "reg_alpha",
]  # fmt: skip
"""XGBoost's numeric tree parameters: XGBoost itself only warns about a name that it does not know."""


class Range(Settings):
    """One dimension of the search space."""

    low: float
    high: float
    log: bool = False
    """Sample on a logarithmic scale."""
    integer: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic scale needs low > 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("with integer, low and high must be whole numbers")
        return self


class ClusterSettings(Settings):
    """A running Dask cluster; its workers need the packages of this project, not its code."""

    address: str = Field(pattern=r"^(tcp|tls|ws|wss|ucx|inproc)://")
    """Address of the scheduler."""


class TrainSettings(Settings):
    """``conf/train.yaml``: data, split, search and resources of one training."""

    data: str
    """CSV or Parquet file, or folder of Parquet files."""
    contract: str
    """The data contract's file."""
    experiment: str
    """MLflow experiment."""
    seed: int
    test_share: float = Field(gt=0, lt=1)
    """Share of rows held out by content hash."""
    trials: int = Field(ge=1)
    """Trials of the study in all; a resumed study runs the rest."""
    folds: int = Field(ge=2)
    max_rounds: int = Field(ge=1)
    early_stopping_rounds: int = Field(ge=1)
    max_bin: int = Field(ge=2, le=65535)
    """Bins a numeric column is cut into before any booster sees it."""
    workers: int | None = Field(ge=1)
    """Parallel evaluations; null: one for each core."""
    cluster: ClusterSettings | None
    """Dask cluster to evaluate on; null: processes of this machine."""
    search_rows: int = Field(ge=1)
    """Rows to search on: a longer Parquet table is searched on a sample and streamed for the final fit."""
    page_rows: int = Field(ge=1)
    """Rows in memory at a time when a table is streamed."""
    cache: str | None
    """Folder for the pages of a streamed table; null: the system's folder for temporary files."""
    pruning: bool
    """Stop a trial that is worse than the median of the others after a fold."""
    study: str | None = Field(pattern=r"^[^\s/]+$")
    """Name of the study; null: derived, so that a changed input starts a new study."""
    storage: str
    """SQLAlchemy address of Optuna's storage."""
    tracking_patience: float = Field(ge=0)
    """Seconds to wait at the end for an MLflow server that is slow or away."""
    first_trial: dict[Parameter, float]
    """Parameters tried first, before the sampler has learnt anything."""
    search_space: dict[Parameter, Range]
    """XGBoost parameter → range."""

    @property
    def first_parameters(self) -> dict[str, float]:
        """`first_trial` in the types that XGBoost wants: YAML's whole numbers were read as floats."""
        whole = {name for name, allowed in self.search_space.items() if allowed.integer}
        return {str(name): int(value) if name in whole else value for name, value in self.first_trial.items()}

    @model_validator(mode="after")
    def _first_trial_is_in_space(self) -> Self:
        if self.first_trial.keys() != self.search_space.keys():
            odd = ", ".join(sorted(self.first_trial.keys() ^ self.search_space.keys()))
            raise ValueError(f"first_trial and search_space must name the same parameters; only one names {odd}")
        for name, value in self.first_trial.items():
            allowed = self.search_space[name]
            if not allowed.low <= value <= allowed.high:
                raise ValueError(f"first_trial.{name} must be in [{allowed.low:g}, {allowed.high:g}]")
        return self


class Thresholds(Settings):
    """Where one decision ends and the next begins, as probabilities of default in [0, 1]."""

    maybe_above: float = Field(ge=0, le=1)
    """Above it a person looks at the application (MAYBE); up to it, it is APPROVED."""
    declined_above: float = Field(ge=0, le=1)
    """Above it the application is DECLINED."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.maybe_above > self.declined_above:
            raise ValueError("maybe_above must not exceed declined_above")
        return self


class LimitSettings(Settings):
    """How much the service takes in before it says no."""

    body_bytes: int = Field(ge=256)
    """Largest body of one application; beyond it the answer is 413."""
    batch_rows: int = Field(ge=1)
    """Most applications in one batch request; beyond it the answer is 400."""
    batch_body_bytes: int = Field(ge=256)
    """Largest body of a batch request; beyond it the answer is 413."""
    body_seconds: float = Field(gt=0)
    """How long a client may take to send its body; then 408, and the connection is closed."""
    requests: int = Field(ge=1)
    """Most applications and explanations being answered at once in a worker; beyond it the answer is 503."""
    batches: int = Field(ge=1)
    """Most batch requests at once in a worker; beyond it the answer is 503."""
    retry_after_seconds: int = Field(ge=1)
    """What a 503 tells the client in its Retry-After."""


class DecisionLogSettings(Settings):
    """The record of every decision: JSON lines in rotating files, written off the hot path."""

    enabled: bool
    folder: str
    """Relative to the folder above ``conf/``."""
    inputs: bool
    """Whether the applicants' values are recorded too."""
    file_bytes: int = Field(ge=4096)
    """Size at which a file is rotated."""
    files: int = Field(ge=1)
    """Files kept of each worker, the current one included."""
    queue_rows: int = Field(ge=1)
    """Decisions that may wait to be written; beyond it they are dropped and counted."""
    flush_seconds: float = Field(gt=0)
    """How often the waiting decisions are written: what a kill -9 can lose."""


class BentoSettings(Settings):
    """Which parts of BentoML's own request path stay on."""

    metrics: bool
    access_log: bool
    tracing: bool
    timeout_seconds: float | None = Field(gt=0)
    """None: BentoML's timeout is taken out."""


class FrontSettings(Settings):
    """The split of ``service:front``: HTTP in some processes, the booster in others."""

    workers: int = Field(ge=1)
    """Processes that answer HTTP."""
    scorers: int = Field(ge=1)
    """Processes that run the booster."""
    calls: int = Field(ge=1)
    """Calls to the scorers that one HTTP process has under way at most."""
    patience_seconds: float = Field(gt=0)
    """How long a request waits for a scorer before it is answered 503."""


class ServeSettings(Settings):
    """``conf/serve.yaml``: what the service answers with, and its limits."""

    thresholds: Thresholds
    reasons: bool
    """Whether ``/classify`` and ``/classify_batch`` give adverse reasons too."""
    workers: int | None = Field(ge=1)
    """Worker processes; None: one for each core."""
    requests_per_connection: int | None = Field(ge=1)
    """Requests that a kept connection carries on average, where several workers answer.

    Whichever worker wakes first accepts all connections that are there. Those that end at random and are opened
    again go to the workers that have least to do. None: they are kept for as long as clients like.
    """
    micro_batch_rows: int = Field(ge=1)
    """Most applications scored in one call of the booster."""
    retry_refused_seconds: float = Field(gt=0)
    """How often a promoted version that failed its checks is tried again."""
    limits: LimitSettings
    decision_log: DecisionLogSettings
    bentoml: BentoSettings
    front: FrontSettings


Metric = Literal["auc", "gini", "ks", "brier", "log_loss", "calibration_slope", "calibration_intercept", "ece"]
"""A metric of `pipeline.evaluation.metrics.metrics`."""


class ChampionSettings(Settings):
    """How a candidate is compared with the champion, on the same rows."""

    margins: dict[Literal["auc", "brier", "log_loss"], float]
    """How much worse than the champion the candidate may be, at the upper end of the confidence interval."""
    confidence: float = Field(gt=0.5, lt=1)
    """One-sided confidence of the interval."""
    resamples: int = Field(ge=100)
    """Bootstrap resamples."""
    rows: int = Field(ge=100)
    """Holdout rows in a resample at most; more of them are thinned evenly."""
    decision_flips: float = Field(ge=0, le=1)
    """Share of holdout applicants whose decision may differ from the champion's."""


class ApprovalSettings(Settings):
    """How the approval rates of the groups of each audit field may differ."""

    at_least: float | None = Field(ge=0, le=1)
    """Lowest group's approval rate over the highest's; null: reported, never a reason to refuse."""
    group_rows: int = Field(ge=1)
    """Groups with fewer holdout rows are left out."""


class ScoreSettings(Settings):
    """``conf/score.yaml``: resources of batch scoring."""

    batch_rows: int = Field(ge=1)
    """Rows read, scored and written at a time."""
    threads: int | None = Field(ge=1)
    """Batches scored at once on this machine; null: one for each core."""
    cluster: ClusterSettings | None
    """Dask cluster over which the batches are spread; null: this machine."""


class PromoteSettings(Settings):
    """``conf/promote.yaml``: what a candidate must show before it is promoted, and how promotions are kept."""

    data: str | None
    """Labelled table whose held-out rows judge; null: the table that the candidate was trained on."""
    holdout_rows: int = Field(ge=1)
    """Held-out rows at least."""
    at_least: dict[Metric, float]
    """Metric on the holdout → floor."""
    at_most: dict[Metric, float]
    """Metric on the holdout → ceiling."""
    against_champion: ChampionSettings
    milliseconds: float = Field(gt=0)
    """Longest time of scoring one application."""
    megabytes: float = Field(gt=0)
    """Largest stored model."""
    approval_ratio: ApprovalSettings
    keep: int = Field(ge=2)
    """Versions kept in the store; the promoted and the previous one always are."""
    lock_seconds: float = Field(ge=0)
    """How long to wait for another promotion on this machine."""
    alias_seconds: float = Field(gt=0)
    """How long a rollback waits for MLflow; then the next `sync` moves the alias."""


def conf_folder() -> Path:
    """Folder of the configuration, wherever a process runs: ``$CREDIT_RISK_CONF``, else the project's."""
    return Path(os.environ.get(CONF_VARIABLE) or Path(__file__).parents[2] / CONF)


def parse_settings(model: type[ModelT], values: Mapping[str, Any], source: str) -> ModelT:
    """Validate a mapping; `source` names the file in the error.

    Raises
    ------
    ConfigError
        One line for each broken key: the key, what is wrong, what was received.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, dict(detail)) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML mapping; a key that stands twice is an error, not a silent overwrite."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    try:
        # _UniqueKeyLoader is a SafeLoader: plain values only.
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values, received {type(values).__name__}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = ", ".join(_keys_beside(model, detail["loc"]))
        return f"{where}: unknown key; allowed: {allowed}"
    if detail["type"] == "missing":
        return f"{where}: missing; {_description(model, detail['loc'])}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    received = "" if isinstance(detail["input"], dict) else f", received {detail['input']!r}"
    return f"{where or 'the file'}: {message}{received}"


def _keys_beside(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    owner = _model_at(model, loc[:-1])
    return list(owner.model_fields) if owner else []


def _description(model: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    owner = _model_at(model, loc[:-1])
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return (field.description if field else None) or "it has no default"


def _model_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Follow an error's location down to the settings class that owns it; mapping keys are stepped over."""
    current: type[BaseModel] | None = model
    for part in loc:
        field = current.model_fields.get(str(part)) if current else None
        if field is not None:
            current = next(_models_in(field.annotation), current)
    return current


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
