"""The features of an application: what the model sees, and what each column means.

The ``DictVectorizer`` is the contract: :func:`feature_dict` makes the mapping that it takes, and
``DictVectorizer.transform`` defines the right answer. The encoders in `pipeline.core.model.encoders` give the same
matrix, bit for bit, in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.ratios import FLOAT32_MAX
from pipeline.core.contract.schema import Schema
from pipeline.core.files import sha256

Matrix = npt.NDArray[np.float32]
Application = Mapping[str, Any]


def make_vectorizer(schema: Schema) -> DictVectorizer:
    """Fit a DictVectorizer on the contract's own categories.

    The columns depend on the contract alone, so every sample, fold and partition of a table gives the same ones.
    """
    numbers: dict[str, Any] = {name: 0.0 for name, field in schema.features.items() if field.is_numeric}
    numbers |= dict.fromkeys(schema.ratios, 0.0)
    one_hots = [{name: category} for name, field in schema.features.items() for category in field.categories]
    return DictVectorizer(dtype=np.float32, sparse=False).fit([numbers, *one_hots])


def feature_dict(application: Application, schema: Schema) -> dict[str, float | str]:
    """Turn one valid application into what ``DictVectorizer.transform`` takes.

    Missing values and codes become NaN, fields of role audit are left out, ratios are added.
    An absent key would become 0 in a DictVectorizer, so every numeric feature is present.
    """
    features: dict[str, Any] = {}
    for name, field in schema.features.items():
        value = application.get(name)
        if field.is_numeric:
            features[name] = _number(value, field.missing)
        elif isinstance(value, str):
            features[name] = value
    for name, ratio in schema.ratios.items():
        value = ratio.of_numbers()(features)
        features[name] = value if abs(value) <= FLOAT32_MAX else math.nan
    return features


def feature_names_digest(vectorizer: DictVectorizer) -> str:
    """Sha256 over the column names in order: the booster's columns have no names of their own."""
    return sha256("\n".join(vectorizer.feature_names_).encode())


def monotone_constraints(schema: Schema, vectorizer: DictVectorizer) -> tuple[int, ...]:
    """XGBoost's ``monotone_constraints`` in column order: 1 increasing, -1 decreasing, 0 free."""
    signs = {"increasing": 1, "decreasing": -1, None: 0}
    directions = {name: field.monotone for name, field in schema.features.items()}
    directions |= {name: ratio.monotone for name, ratio in schema.ratios.items()}
    return tuple(signs[directions.get(name)] for name in vectorizer.feature_names_)


def field_shares(schema: Schema, vectorizer: DictVectorizer) -> dict[str, Matrix]:
    """How much of each column belongs to each of the applicant's fields.

    A one-hot belongs to its field; a ratio belongs in equal parts to the fields that it is made of,
    directly or through other ratios.

    Returns
    -------
    dict
        Field name → weights over the columns, shape (k,). For each column the weights sum to 1.
    """
    shares = {name: np.zeros(len(vectorizer.feature_names_), dtype=np.float32) for name in schema.features}
    for position, column in enumerate(vectorizer.feature_names_):
        owners = _owners(column.partition(vectorizer.separator)[0], schema)
        for owner in owners:
            shares[owner][position] = 1 / len(owners)
    return shares


def _number(value: Any, missing: Sequence[float]) -> float:
    if value is None or value in missing:
        return math.nan
    return float(value)


def _owners(name: str, schema: Schema) -> tuple[str, ...]:
    if name in schema.features:
        return (name,)
    used = [owner for part in schema.ratios[name].names for owner in _owners(part, schema)]
    return tuple(dict.fromkeys(used))
