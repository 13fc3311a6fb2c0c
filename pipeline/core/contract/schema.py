"""The data contract: ``conf/schema.yaml`` in, row checks for tables and the request model for HTTP out."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Annotated, Any, Literal, NotRequired, Self, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    TypeAdapter,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic import Field as PydanticField
from pydantic_core import PydanticKnownError
from typing_extensions import TypedDict

from pipeline.core.contract import columns
from pipeline.core.contract.columns import Column, Table
from pipeline.core.errors import DataError
from pipeline.core.files import sha256
from pipeline.core.settings import Settings

Kind = Literal["integer", "number", "category"]
Monotone = Literal["increasing", "decreasing"]
Values = Sequence[Any] | npt.NDArray[np.float64]
"""Values of one field, one a row."""

_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.Name, ast.Load)


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
        """Smallest and largest accepted number, inclusive."""
        return (-math.inf if self.min is None else self.min, math.inf if self.max is None else self.max)

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        if self.is_numeric:
            self._check_numeric()
        else:
            self._check_category()
        return self

    def _check_numeric(self) -> None:
        if self.min is None or self.max is None or self.min > self.max:
            raise ValueError(f"a field of kind {self.kind} needs min and max, with min <= max")
        if self.categories:
            raise ValueError(f"categories belong to kind category, not to {self.kind}")
        if isinstance(self.example, str) or not self.min <= self.example <= self.max:
            raise ValueError(f"the example must be a number in [{self.min:g}, {self.max:g}]")
        if any(not self.min <= code <= self.max for code in self.missing):
            raise ValueError("codes in missing must lie within [min, max]; widen the range or recode the data")

    def _check_category(self) -> None:
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise ValueError("a field of kind category needs a list of distinct categories")
        if self.min is not None or self.max is not None or self.missing or self.monotone:
            raise ValueError("min, max, missing and monotone belong to numbers, not to kind category")
        if self.example not in self.categories:
            raise ValueError("the example must be one of the categories")
        if any(":" in category for category in self.categories):
            raise ValueError("categories must not contain ':' (repeated keys are found by counting colons)")


class Ratio(Settings):
    """A feature derived from fields and earlier ratios."""

    expression: str
    """Names, numbers, + - * / and parentheses."""
    description: str
    monotone: Monotone | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names used in the expression, each once, in order of appearance."""
        found = [node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)]
        return tuple(dict.fromkeys(found))

    @property
    def tree(self) -> ast.expr:
        """The parsed expression."""
        return ast.parse(self.expression, mode="eval").body

    @model_validator(mode="after")
    def _is_arithmetic(self) -> Self:
        try:
            nodes = list(ast.walk(self.tree))
        except SyntaxError:
            raise ValueError("the expression is not arithmetic such as (a - b) / c") from None
        for node in nodes:
            if not _is_allowed(node):
                raise ValueError("the expression may hold only names, numbers, + - * / and parentheses")
        return self


class Target(Settings):
    """The column to predict, and its two labels."""

    name: str
    """Column of the labels."""
    negative: str | int
    """The label counted as 0."""
    positive: str | int
    """The label counted as 1; the model's probability is of this one."""
    description: str = ""


class Schema(Settings):
    """The whole data contract, as ``conf/schema.yaml`` declares it."""

    name: str
    target: Target
    fields: dict[str, Field]
    ratios: dict[str, Ratio] = PydanticField(default_factory=dict)

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        known = {name for name, field in self.features.items() if field.is_numeric}
        for name, ratio in self.ratios.items():
            if name in self.fields or name == self.target.name:
                raise ValueError(f"ratios.{name}: the name is taken by a field")
            if unknown := [used for used in ratio.names if used not in known]:
                raise ValueError(
                    f"ratios.{name}: {', '.join(unknown)} is neither a numeric feature nor a ratio above it"
                )
            known.add(name)
        for name in (*self.fields, *self.ratios):
            if not name.isidentifier():
                raise ValueError(f"{name!r}: names are letters, digits and underscores, not starting with a digit")
        if self.target.name in self.fields:
            raise ValueError(f"fields.{self.target.name}: the target must not be a field")
        if not self.features:
            raise ValueError("fields: at least one must have the role feature")
        return self

    @cached_property
    def features(self) -> dict[str, Field]:
        """The fields that enter the model."""
        return {name: field for name, field in self.fields.items() if field.role == "feature"}

    @cached_property
    def digest(self) -> str:
        """Sha256 of the contract in canonical JSON, as 64 hex digits."""
        return sha256(json.dumps(self.document(), sort_keys=True).encode())

    def document(self) -> dict[str, Any]:
        """Give the contract as plain values, the form in which it travels with a model."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def example(self) -> dict[str, Any]:
        """One valid application, made of the fields' examples."""
        return {name: field.example for name, field in self.fields.items()}

    def labels(self, frame: pd.DataFrame) -> npt.NDArray[np.float32]:
        """Labels of a validated frame: shape (n,), float32, 1 = `target.positive`."""
        return np.asarray(frame[self.target.name] == self.target.positive, dtype=np.float32)

    @cached_property
    def request_model(self) -> type[BaseModel]:
        """The pydantic model of one application, for documentation and clients."""
        definitions: dict[str, Any] = {
            name: (_annotation(field), None if field.optional else ...) for name, field in self.fields.items()
        }
        return create_model("Application", __config__=_REQUEST_CONFIG, **definitions)

    @cached_property
    def request_adapter(self) -> TypeAdapter[dict[str, Any]]:
        """The same rules over plain dictionaries: the compiled validator of the hot path."""
        return TypeAdapter(self._typed_dict())

    @cached_property
    def batch_adapter(self) -> TypeAdapter[list[dict[str, Any]]]:
        """The validator of a JSON array of applications; it stops at the first row that breaks the contract."""
        application = self._typed_dict()
        return TypeAdapter(cast("Any", Annotated[list[application], FailFast()]))  # type: ignore[valid-type]

    def _typed_dict(self) -> Any:
        keys = {
            name: NotRequired[_annotation(field)] if field.optional else _annotation(field)
            for name, field in self.fields.items()
        }
        # TypedDict's functional form takes its keys at run time; type checkers know only the literal one.
        application = cast("Any", TypedDict)("Application", keys)
        application.__pydantic_config__ = _REQUEST_CONFIG
        return application


_REQUEST_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _annotation(field: Field) -> Any:
    description = f"{field.description} Unit: {field.unit}." if field.unit else field.description
    document: dict[str, Any] = {"description": description, "example": field.example}
    if field.is_numeric:
        document |= {"type": field.kind, "minimum": field.min, "maximum": field.max}
        annotation: Any = Annotated[float, PydanticField(ge=field.min, le=field.max)]
        if field.kind == "integer":
            annotation = Annotated[annotation, AfterValidator(_whole)]
    else:
        document |= {"type": "string", "enum": list(field.categories)}
        annotation = Literal[field.categories]
    if field.optional:
        annotation = annotation | None
        # OpenAPI 3.0 has no type "null"; it says "nullable".
        document |= {"nullable": True}
    return Annotated[annotation, WithJsonSchema(document)]


def _whole(value: float) -> float:
    # pydantic's own multiple_of forgives a billionth, so that 1e-42 would pass for a whole number.
    if value % 1:
        raise PydanticKnownError("multiple_of", {"multiple_of": 1})
    return value


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    return isinstance(node, _ARITHMETIC)


@dataclass(frozen=True)
class Violation:
    """A rule that some rows of a table break.

    Attributes
    ----------
    column, rule
        Where, and what is allowed.
    rows
        Boolean mask of the rows that break it, shape (n,).
    """

    column: str
    rule: str
    rows: npt.NDArray[np.bool_]

    def __str__(self) -> str:
        first = ", ".join(str(position + 1) for position in np.flatnonzero(self.rows)[:5])
        count = int(self.rows.sum())
        return f"{self.column}: {self.rule}: {count} {'row' if count == 1 else 'rows'}, first at {first}"


def check_columns(table: Table, schema: Schema, *, labelled: bool) -> None:
    """Raise `DataError` if a column that the contract requires is absent.

    Parameters
    ----------
    labelled
        Whether the target's column is required too.
    """
    present = columns.names(table)
    required = [name for name, field in schema.fields.items() if not field.optional]
    required += [schema.target.name] if labelled else []
    absent = [name for name in required if name not in present]
    if not absent:
        return
    unknown = [name for name in present if name not in {*schema.fields, schema.target.name}]
    hint = f"; columns unknown to the contract: {', '.join(unknown)}" if unknown else ""
    raise DataError(
        f"required columns are absent: {', '.join(absent)}{hint}; rename them, or adapt the schema file"
    )


def violations(table: Table, schema: Schema) -> Iterator[Violation]:
    """Check every present field of a table (pandas or Arrow) against the contract, column by column.

    Rows are counted from 1, without the header. Optional columns may be absent.
    """
    for name, field in schema.fields.items():
        column = columns.pick(table, name)
        if column is None:
            continue
        check = _numeric_violations if field.is_numeric else _category_violations
        for rule, rows in check(column, field):
            if rows.any():
                yield Violation(name, rule, rows)


def _numeric_violations(column: Column, field: Field) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    empty = columns.is_empty(column)
    if columns.is_boolean(column):
        yield "must be a number, not true or false", ~empty
        return
    values = columns.as_numbers(column)
    numeric = ~np.isnan(values)
    if not field.optional:
        yield "must not be missing", empty
    yield "must be a number", ~empty & ~numeric
    low, high = field.bounds
    yield f"must be in [{low:g}, {high:g}]", numeric & ((values < low) | (values > high))
    if field.kind == "integer":
        yield "must be a whole number", numeric & np.isfinite(values) & (values != np.floor(values))


def _category_violations(column: Column, field: Field) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    empty = columns.is_empty(column)
    if not field.optional:
        yield "must not be missing", empty
    known = columns.positions(column, field.categories) >= 0
    yield f"must be one of {', '.join(field.categories)}", ~empty & ~known


def valid_columns(rows: Sequence[Any], schema: Schema) -> dict[str, Values] | None:
    """Check parsed JSON values by columns, and give them by columns.

    It takes a fraction of the validator's time. None is no verdict: the validator looks closer and says why.

    Returns
    -------
    dict
        Only if `Schema.batch_adapter` accepts every row, unchanged. Field name → its values, shape (n,): numbers
        as float64, NaN where a row has none; categories as they are, None where a row has none.
    """
    found: dict[str, Values] = {}
    try:
        if not set(map(type, rows)) <= {dict}:
            return None
        for (name, field), values in zip(schema.fields.items(), _by_field(rows, schema), strict=True):
            checked = _numbers(values, field) if field.is_numeric else _categories(values, field)
            if checked is None:
                return None
            found[name] = checked
    except (TypeError, OverflowError, _Unknown):  # such as a list where a category should be, or 10 ** 400
        return None
    return found


class _Unknown(Exception):
    """A row has a key that the contract does not know."""


def _by_field(rows: Sequence[Mapping[str, Any]], schema: Schema) -> Iterable[Sequence[Any]]:
    names = tuple(schema.fields)
    if len(names) > 1 and set(map(len, rows)) == {len(names)}:
        with suppress(KeyError):
            # Every row has just these keys, as most batches: three times as fast as to ask for each.
            return zip(*map(itemgetter(*names), rows), strict=True)
    if not set().union(*rows) <= schema.fields.keys():
        raise _Unknown
    return ([row.get(name) for row in rows] for name in names)


def _categories(values: Sequence[Any], field: Field) -> Sequence[Any] | None:
    return values if set(values) <= {*field.categories, *([None] if field.optional else [])} else None


def _numbers(values: Sequence[Any], field: Field) -> npt.NDArray[np.float64] | None:
    types = set(map(type, values))
    if not types <= {int, float, *([type(None)] if field.optional else [])}:
        return None
    numbers = np.array(values, dtype=np.float64)
    stated = numbers[~np.isnan(numbers)] if type(None) in types else numbers
    return numbers if _within(stated, field) else None


def _within(numbers: npt.NDArray[np.float64], field: Field) -> bool:
    if not len(numbers):
        return True
    low, high = field.bounds
    in_range = low <= numbers.min() and numbers.max() <= high and bool(np.isfinite(numbers).all())
    return in_range and (field.kind != "integer" or bool((numbers == np.floor(numbers)).all()))


def load_schema(source: Mapping[str, Any]) -> Schema:
    """Rebuild the contract that travelled with a model (the inverse of `Schema.document`)."""
    return Schema.model_validate(source)
