"""Find the version that a promotion is about, and get its files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import PromotionRefused, TrackingError
from pipeline.core.promoted import Promotion, promotions
from pipeline.promotion.request import PromoteRequest
from pipeline.registry import client
from pipeline.registry.client import ModelVersion

if TYPE_CHECKING:
    from pipeline.promotion.staging import Stored

BEST_BY = "test_log_loss"
"""Metric of the training run by which ``--best`` chooses: lower is better."""


def chosen(request: PromoteRequest) -> ModelVersion:
    """Return the version that the flags name.

    Raises
    ------
    TrackingError
        There is none, or MLflow cannot be asked.
    """
    if request.version:
        return client.by_number(request.version)
    if request.run_id:
        return client.by_run(request.run_id)
    if request.best:
        return client.lowest(BEST_BY)
    candidate = client.by_alias(client.CANDIDATE)
    if candidate is None:
        raise TrackingError(
            f"no version has the alias {client.CANDIDATE}; train one, or name one with --version N"
        )
    return candidate


def champion(current: Promotion | None) -> ModelVersion | None:
    """The version to compare with: MLflow's champion, else what this machine promoted, if MLflow knows it."""
    named = client.by_alias(client.CHAMPION)
    if named or current is None:
        return named
    with contextlib.suppress(TrackingError):
        version = client.by_number(current.version)
        return version if is_same(current, version) else None
    return None


def require_undisputed(defender: ModelVersion | None) -> None:
    """Discard a verdict if another machine promoted meanwhile: its comparison is with a champion of the past.

    Raises
    ------
    PromotionRefused
        MLflow's champion is not the one that was judged against.
    """
    named = client.by_alias(client.CHAMPION)
    if named and (defender is None or named.number != defender.number):
        raise PromotionRefused(
            f"{named.tag} was promoted elsewhere while this command was judging, so its verdict no longer holds. "
            "Run it again"
        )


def is_same(promotion: Promotion, version: ModelVersion) -> bool:
    """Whether a promotion is of this very version."""
    # The number alone is not enough: a new tracking database counts from 1 again.
    return promotion.version == version.number and promotion.run_id == version.run_id


def staged(version: ModelVersion, bench: Path) -> Stored:
    """Open the version in the store if it is whole there; otherwise stage it from MLflow.

    Raises
    ------
    TrackingError
        MLflow's model cannot be downloaded, or a file of it is not the one that was logged.
    StoreError
        It cannot be staged.
    """
    from pipeline.promotion import staging
    from pipeline.registry.logged_model import open_model

    for promotion in promotions():
        if is_same(promotion, version):
            found = staging.reopen(promotion.tag, promotion.digests)
            if found is not None:
                return found
    metadata = {"mlflow_version": str(version.number), "mlflow_run_id": version.run_id}
    return staging.stage(open_model(version.uri), version.tag, bench, metadata)
