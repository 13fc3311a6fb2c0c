"""Checks of request bodies against the contract: one application, or a batch of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Annotated, Any, Literal, NotRequired, cast

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, TypeAdapter, WithJsonSchema
from pydantic import Field as PydanticField
from pydantic_core import CoreConfig, PydanticKnownError, SchemaValidator
from typing_extensions import TypedDict

from pipeline.core.contract.schema import Field, Schema

Values = Sequence[Any] | npt.NDArray[np.float64]
"""Values of one field, one a row."""

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def request_validator(schema: Schema) -> SchemaValidator:
    """Compile the contract's rules for the body of one application; it takes milliseconds.

    Its errors do not show what was received: an applicant's values belong in no log.
    """
    # pydantic passes the setting on from a model, but not from a typed dictionary.
    return SchemaValidator(TypeAdapter(_application(schema)).core_schema, CoreConfig(hide_input_in_errors=True))


def request_document(schema: Schema) -> dict[str, Any]:
    """JSON schema of one application, for the API's documentation."""
    return TypeAdapter(_application(schema)).json_schema()


def valid_columns(rows: Sequence[Any], schema: Schema) -> dict[str, Values] | None:
    """Check parsed JSON values by columns, and return them by columns.

    With the encoding that it allows, it takes a quarter of the time of the validator and of encoding row by row.
    None is no verdict: the validator looks closer and says why.

    Returns
    -------
    dict
        Only if `request_validator` accepts every row, unchanged. Field name → its values, shape (n,):
        numbers as float64, NaN where a row has none; categories as they are, None where a row has none.
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
    except (TypeError, OverflowError, _UnknownKey):  # such as a list where a category should be, or 10 ** 400
        return None
    return found


def _application(schema: Schema) -> Any:
    keys = {
        name: NotRequired[_annotation(field)] if field.optional else _annotation(field)
        for name, field in schema.fields.items()
    }
    # TypedDict's functional form takes its keys at run time; type checkers know only the literal one.
    application = cast("Any", TypedDict)("Application", keys)
    application.__pydantic_config__ = _CONFIG
    return application


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


class _UnknownKey(Exception):
    """A row has a key that the contract does not know."""


def _by_field(rows: Sequence[Mapping[str, Any]], schema: Schema) -> Iterable[Sequence[Any]]:
    names = tuple(schema.fields)
    if len(names) > 1 and set(map(len, rows)) == {len(names)}:
        with suppress(KeyError):
            # Every row has just these keys, as in most batches: three times as fast as asking for each.
            return zip(*map(itemgetter(*names), rows), strict=True)
    if not set().union(*rows) <= schema.fields.keys():
        raise _UnknownKey
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
