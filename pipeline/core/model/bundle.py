"""Open a stored model, after every byte of it was verified."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import xgboost as xgb
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import StoreError
from pipeline.core.files import NotRegularFile, access_denied, read_regular_file, sha256
from pipeline.core.model.encoders import RowEncoder
from pipeline.core.model.features import Matrix
from pipeline.core.model.predictor import Predictor

BOOSTER_FILE = "saved_model.ubj"
OBJECTS_FILE = "custom_objects.pkl"

VECTORIZER = "DictVectorizer"
SCHEMA = "schema"
GOLDEN = "golden"
"""Keys of the BentoML model's custom objects."""

_FEW = 64
"""Rows up to which `Predictor` is faster; beyond, other threads gain from the lock that XGBoost gives up."""

TOLERANCE = 1e-6
"""Largest difference between two probabilities that count as the same."""


@dataclass(frozen=True)
class Bundle:
    """A model that is ready to score.

    Attributes
    ----------
    booster
        Gives probabilities of default; one thread.
    vectorizer
        The fitted DictVectorizer that defines the columns.
    schema
        The contract that the model was trained with.
    golden
        Applications under ``rows``; under ``probabilities`` those that the model must give for them.
    """

    booster: xgb.Booster
    vectorizer: DictVectorizer
    schema: Schema
    golden: Mapping[str, Any]

    def probabilities(self, matrix: Matrix) -> Matrix:
        """Probabilities of default in [0, 1]: matrix (n, k) → shape (n,), float32."""
        if len(matrix) <= _FEW:
            return self._score_few(matrix)
        return np.asarray(self.booster.inplace_predict(matrix), dtype=np.float32)

    @cached_property
    def _score_few(self) -> Predictor:
        return Predictor(self.booster)

    def golden_difference(self) -> float:
        """Score the golden rows the way requests are scored: the largest difference from what was recorded."""
        matrix = RowEncoder(self.schema, self.vectorizer).transform(self.golden["rows"])
        expected = np.asarray(self.golden["probabilities"], dtype=np.float64)
        return float(np.max(np.abs(self.probabilities(matrix) - expected)))

    def check_golden(self) -> None:
        """Refuse a model that no longer answers as it did when it was stored.

        Raises
        ------
        StoreError
            A probability differs by more than `TOLERANCE` from the one recorded.
        """
        worst = self.golden_difference()
        if not worst <= TOLERANCE:
            raise StoreError(
                f"golden rows: the answers differ by {worst:.3g} from those recorded, more than {TOLERANCE:g}; "
                "promote the version again"
            )


def open_bundle(folder: Path, digests: Mapping[str, str]) -> Bundle:
    """Verify every file of a stored model, then load it from the very bytes that were verified.

    The custom objects are a pickle, and a damaged booster file can crash the process that reads it:
    neither is opened before all digests agree.

    Raises
    ------
    StoreError
        A file is absent, altered or unexpected, or the model cannot be loaded.
    """
    contents = _verified(folder, digests)
    try:
        objects = cloudpickle.loads(contents[OBJECTS_FILE])
        booster = xgb.Booster(model_file=bytearray(contents[BOOSTER_FILE]))
        booster.set_param({"nthread": 1})
        return Bundle(booster, objects[VECTORIZER], load_schema(objects[SCHEMA]), objects[GOLDEN])
    except Exception as error:
        raise StoreError(
            f"{folder}: cannot be loaded ({type(error).__name__}); promote the version again"
        ) from error


def _verified(folder: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    try:
        present = _files_below(folder)
        if present != set(digests):
            odd = ", ".join(sorted(present ^ set(digests)))
            raise StoreError(
                f"{folder}: not the files that were promoted (absent or unexpected: {odd}); "
                "restore them, or roll back"
            )
        contents = {name: _content(folder / name) for name in digests}
    except PermissionError as error:
        raise StoreError(access_denied(error)) from error
    for name, content in contents.items():
        if sha256(content) != digests[name]:
            raise StoreError(f"{folder / name}: its sha256 is not the promoted one; restore it, or roll back")
    return contents


def _files_below(folder: Path) -> set[str]:
    """List everything below a folder except folders; unlike `Path.rglob`, fail if a folder may not be read."""

    def unless_absent(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    parents = os.walk(folder, onerror=unless_absent)
    return {(Path(parent) / name).relative_to(folder).as_posix() for parent, _, names in parents for name in names}


def _content(path: Path) -> bytes:
    try:
        return read_regular_file(path)
    except NotRegularFile as error:
        raise StoreError(f"{path}: {error}; restore it, or roll back") from None
