"""The data contract, as ``conf/schema.yaml`` declares it and as it travels with a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field as PydanticField
from pydantic import model_validator

from pipeline.core.contract import columns
from pipeline.core.contract.columns import Table
from pipeline.core.contract.ratios import FLOAT32_MAX, Monotone, Ratio
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256
from pipeline.core.settings import Settings, parse_settings

Kind = Literal["integer", "number", "category"]

RESERVED = ("probability", "decision", "model", "rejected_row", "rejected_because")
"""Columns that ``score`` adds to a table; a contract must not use these names."""


class Field(Settings):
    """One column of the table and one key of the request."""

    kind: Kind
    """integer, number or category."""
    description: str
    """One sentence for people."""
    example: int | float | str
    """A valid value; the examples of all fields form the example request."""
    unit: str | None = None
    min: float | None = None
    max: float | None = None
    categories: tuple[str, ...] = PydanticField(default=(), strict=False)
    optional: bool = False
    missing: tuple[float, ...] = PydanticField(default=(), strict=False)
    role: Literal["feature", "audit"] = "feature"
    monotone: Monotone | None = None
    reason: str | None = None

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers."""
        return self.kind != "category"

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest accepted number, inclusive; a category has none: (-inf, inf)."""
        return (-np.inf if self.min is None else self.min, np.inf if self.max is None else self.max)

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        if self.is_numeric:
            self._check_numeric()
        else:
            self._check_category()
        return self

    def _check_numeric(self) -> None:
        # Written so that NaN, which compares as false, breaks the rule.
        if self.min is None or self.max is None or not -FLOAT32_MAX <= self.min <= self.max <= FLOAT32_MAX:
            raise ValueError(
                f"a field of kind {self.kind} needs min <= max, both within ±3.4e38 (float32): "
                f"min is {self.min}, max is {self.max}"
            )
        if self.categories:
            raise ValueError(f"only a field of kind category has categories; this one is {self.kind}")
        if not self._is_value(self.example):
            whole = "a whole number" if self.kind == "integer" else "a number"
            raise ValueError(f"the example must be {whole} in [{self.min:g}, {self.max:g}]")
        if any(not self.min <= code <= self.max for code in self.missing):
            raise ValueError("codes in missing must lie within [min, max]; widen the range or recode the data")

    def _is_value(self, value: float | str) -> bool:
        low, high = self.bounds
        if isinstance(value, str) or not low <= value <= high:
            return False
        return self.kind != "integer" or value % 1 == 0

    def _check_category(self) -> None:
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise ValueError("a field of kind category needs a list of distinct categories")
        if self.min is not None or self.max is not None or self.missing or self.monotone:
            raise ValueError("min, max, missing and monotone belong to numbers, not to kind category")
        if self.example not in self.categories:
            raise ValueError("the example must be one of the categories")
        if any(":" in category for category in self.categories):
            raise ValueError("categories must not contain ':' (repeated keys are found by counting colons)")


class Target(Settings):
    """The column to predict, and its two labels."""

    name: str
    """Column of the labels."""
    negative: str | int
    """The label counted as 0."""
    positive: str | int
    """The label counted as 1; the model's probability is of this one."""
    description: str = ""

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        if self.negative == self.positive:
            raise ValueError("negative and positive must be two different labels")
        return self


class Schema(Settings):
    """The whole data contract."""

    name: str
    target: Target
    fields: dict[str, Field]
    ratios: dict[str, Ratio] = PydanticField(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **flags: Any) -> Self:
        """Read the contract of a table; see `Settings.load`.

        Raises
        ------
        ConfigError
            The contract breaks its rules, or uses a name in `RESERVED`. A contract that travels with a model
            may use one: those models were trained before the names were reserved.
        """
        schema = super().load(path, **flags)
        if taken := [name for name in (*schema.fields, schema.target.name) if name in RESERVED]:
            raise ConfigError(
                f"{path}: {', '.join(taken)}: `score` adds columns of the names {', '.join(RESERVED)}; "
                "rename the column, in the table and here"
            )
        return schema

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        for name in (*self.fields, *self.ratios):
            if not name.isidentifier():
                raise ValueError(f"{name!r}: names are letters, digits and underscores, not starting with a digit")
        if self.target.name in self.fields:
            raise ValueError(f"fields.{self.target.name}: the target must not be a field")
        if not self.features:
            raise ValueError("fields: at least one must have the role feature")
        self._check_ratios()
        return self

    def _check_ratios(self) -> None:
        known = {name for name, field in self.features.items() if field.is_numeric}
        for name, ratio in self.ratios.items():
            if name in self.fields or name == self.target.name:
                raise ValueError(f"ratios.{name}: a field or the target has that name")
            if unknown := [used for used in ratio.names if used not in known]:
                raise ValueError(
                    f"ratios.{name}: {', '.join(unknown)} is neither a numeric feature nor a ratio above it"
                )
            known.add(name)

    @cached_property
    def features(self) -> dict[str, Field]:
        """The fields that enter the model."""
        return {name: field for name, field in self.fields.items() if field.role == "feature"}

    @cached_property
    def digest(self) -> str:
        """Sha256 of the contract in canonical JSON, as 64 hex digits."""
        return sha256(json.dumps(self.document(), sort_keys=True).encode())

    def document(self) -> dict[str, Any]:
        """Return the contract as plain values, the form in which it travels with a model."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def example(self) -> dict[str, Any]:
        """One valid application, made of the fields' examples."""
        return {name: field.example for name, field in self.fields.items()}

    def labels(self, table: Table) -> npt.NDArray[np.float32]:
        """Labels of a validated table, which has them: shape (n,), float32, 1 = `target.positive`."""
        column = columns.pick(table, self.target.name)
        if column is None:
            raise KeyError(self.target.name)
        return columns.equals(column, self.target.positive).astype(np.float32)


def load_schema(source: Mapping[str, Any]) -> Schema:
    """Rebuild the contract that travelled with a model (the inverse of `Schema.document`).

    Raises
    ------
    ConfigError
        The contract breaks its own rules.
    """
    return parse_settings(Schema, source, source="the model's contract")
