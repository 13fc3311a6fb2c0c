"""The decision log, as the service writes it and monitoring reads it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline.core.settings import Settings, parse_settings, read_yaml

DECISION_FILE = "decisions-{}.jsonl"
"""Name of a file of the decision log: the placeholder holds the worker's number and, once rotated, the file's."""


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
    """Decisions are written within this time: what a kill -9 can lose.

    Waiting takes half of it, so that the other half is left to write; a busy machine may need longer.
    """


def decision_log_settings(serve_yaml: Path) -> DecisionLogSettings:
    """Read ``decision_log`` of a ``serve.yaml``, for those that look at the log and not at the rest.

    Raises
    ------
    ConfigError
        The file cannot be read, or these settings break a rule.
    """
    values = read_yaml(serve_yaml).get("decision_log", {})
    return parse_settings(DecisionLogSettings, values, source=f"{serve_yaml}: decision_log")
