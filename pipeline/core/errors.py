"""Failures that a user can act on: each says the rule, the value received and the cure."""

from __future__ import annotations


class PipelineError(Exception):
    """Base of every failure that ends a command with exit code 1 and one readable message."""


class ConfigError(PipelineError):
    """A file in ``conf/`` or a flag over it breaks its own rules."""


class DataError(PipelineError):
    """A table, a row or a file breaks the data contract."""


class TrackingError(PipelineError):
    """MLflow cannot be reached, or does not hold what was asked for."""


class ClusterError(PipelineError):
    """The Dask cluster cannot be used, or lost a worker too often."""


class StoreError(PipelineError):
    """A stored model or the promoted pointer is missing, altered or unreadable."""


class PointerUnreadable(StoreError):
    """The promoted pointer exists but cannot be read, so the promoted version is unknown."""


class PromotionRefused(PipelineError):
    """A promotion was refused: by the gate, by a failed check, or because another one is in progress."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the name of its class if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
