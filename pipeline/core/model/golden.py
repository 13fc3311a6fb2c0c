"""Golden rows: applications made from the contract, by whose answers a model is recognised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.core.contract.schema import Field, Schema

_RANDOM_ROWS = 32
"""Golden rows beside the example and the contract's edges."""


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


def _random(field: Field, generator: np.random.Generator) -> Any:
    if field.optional and generator.random() < 0.15:
        return None
    if not field.is_numeric:
        return field.categories[generator.integers(len(field.categories))]
    # Amounts spread over orders of magnitude: uniform draws would all be huge.
    low, high = float(field.min or 0), float(field.max or 0)
    value = low + math.expm1(generator.uniform(0, math.log1p(high - low)))
    return float(round(value)) if field.kind == "integer" else value
