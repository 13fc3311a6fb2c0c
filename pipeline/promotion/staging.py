"""An MLflow model version in, a BentoML model out: staged, loaded and queried before it may enter the store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.contract.schema import Field, Schema
from pipeline.core.errors import PipelineError, StoreError, TrackingError, first_line
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import BOOSTER_FILE, GOLDEN, SCHEMA, VECTORIZER, Bundle, open_bundle
from pipeline.core.promoted import version_home
from pipeline.promotion.failpoint import failpoint
from pipeline.registry.logged_model import Parts, load_parts

_RANDOM_ROWS = 32
"""Golden rows beside the example and the contract's edges."""


@dataclass(frozen=True)
class Stored:
    """A model as the service would open it.

    Attributes
    ----------
    tag
        Its tag in the BentoML store.
    folder
        Where it lies: on the workbench, or in the store already.
    digests
        Sha256 of each of its files.
    bundle
        What opening it gave.
    """

    tag: str
    folder: Path
    digests: Mapping[str, str]
    bundle: Bundle

    @property
    def megabytes(self) -> float:
        """Size of all its files, in 10^6 bytes."""
        return sum((self.folder / name).stat().st_size for name in self.digests) / 1e6


def stage(uri: str, tag: str, bench: Path, metadata: Mapping[str, str]) -> Stored:
    """Save an MLflow model as a BentoML model on the workbench, and open it there as the service will.

    Parameters
    ----------
    uri
        MLflow model, such as ``models:/credit_risk_model/3``.
    tag
        Its tag in the store, such as ``credit_risk_model:v3``.
    bench
        Folder of `pipeline.promotion.store_folders.workbench`.
    metadata
        Facts kept in the BentoML model.

    Raises
    ------
    TrackingError
        MLflow's model cannot be loaded.
    StoreError
        The BentoML model cannot be written whole, or not be opened.
    """
    parts = load_parts(uri)
    rows = golden_rows(parts.schema)
    golden = {"rows": rows, "probabilities": reference(uri, rows)}
    folder = _save(parts, tag, bench, golden, metadata)
    failpoint("after-stage")
    # A full disk can cut the booster's file without a word, and a cut file can crash the process that loads it.
    if (folder / BOOSTER_FILE).read_bytes() != bytes(parts.booster.save_raw("ubj")):
        raise StoreError(f"{folder}: the booster was not written whole; free space and promote again")
    digests = file_digests(folder)
    return Stored(tag, folder, digests, open_bundle(folder, digests))


def reopen(tag: str, digests: Mapping[str, str]) -> Stored | None:
    """Open a version that is in the store already; None if it is absent or not what it was."""
    try:
        folder = version_home(tag)
        return Stored(tag, folder, digests, open_bundle(folder, digests))
    except StoreError:
        return None


def reference(uri: str, rows: list[dict[str, Any]]) -> list[float]:
    """What the MLflow model itself, through its own ``predict``, answers for applications.

    Raises
    ------
    TrackingError
        It cannot be loaded, or does not predict.
    """
    import mlflow

    try:
        predicted = mlflow.pyfunc.load_model(uri, suppress_warnings=True).predict(pd.DataFrame(rows))
    except PipelineError:
        raise
    except Exception as error:  # the model is code, and may raise anything
        reason = first_line(error)
        raise TrackingError(f"{uri}: must load and predict with MLflow, failed: {reason}") from error
    return [float(probability) for probability in np.asarray(predicted).ravel()]


def golden_rows(schema: Schema) -> list[dict[str, Any]]:
    """Applications made from the contract alone, the same each time; no applicant's data travels with a model.

    The example, each field at its edges, each category, each missing value, and seeded random ones.
    """
    example = schema.example()
    rows = [example]
    for name, field in schema.fields.items():
        edges: list[Any] = [field.min, field.max, *field.missing] if field.is_numeric else [*field.categories]
        rows += [{**example, name: value} for value in [*edges, *([None] if field.optional else [])]]
    generator = np.random.default_rng(0)
    rows += [
        {name: _random(field, generator) for name, field in schema.fields.items()} for _ in range(_RANDOM_ROWS)
    ]
    return rows


def _save(parts: Parts, tag: str, bench: Path, golden: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
    import bentoml
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    store = bench / "models"
    store.mkdir()
    # `Store.register` copies straight into the final folder and rewrites `latest` in place: not in the real store.
    BentoMLContainer.model_store.set(ModelStore(store))
    try:
        bentoml.xgboost.save_model(
            tag,
            parts.booster,
            custom_objects={VECTORIZER: parts.vectorizer, SCHEMA: parts.schema.document(), GOLDEN: dict(golden)},
            metadata=dict(metadata),
        )
    except OSError:
        raise
    except Exception as error:  # XGBoost's and BentoML's own errors share no base
        reason = first_line(error)
        raise StoreError(f"{tag}: cannot be saved as a BentoML model: {reason}; check space and rights") from error
    finally:
        BentoMLContainer.model_store.reset()
    name, _, version = tag.partition(":")
    return store / name / version


def _random(field: Field, generator: np.random.Generator) -> Any:
    if field.optional and generator.random() < 0.15:
        return None
    if not field.is_numeric:
        return field.categories[generator.integers(len(field.categories))]
    # Amounts spread over orders of magnitude: uniform draws would all be huge.
    low, high = float(field.min or 0), float(field.max or 0)
    value = low + math.expm1(generator.uniform(0, math.log1p(high - low)))
    return float(round(value)) if field.kind == "integer" else value
