"""Parse and validate request bodies, in steps so small that no body keeps other requests waiting."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import orjson
from pydantic import ValidationError
from pydantic_core import SchemaValidator

from pipeline.core.contract.requests import Values, valid_columns
from pipeline.core.contract.schema import Schema
from service.answering.refusal import MOST_DETAILS, Detail, Refusal, contract_refusal, detail, details_of
from service.settings import LimitSettings

Row = dict[str, Any]

_SMALL = 4096
"""Bytes of a body that may hold anything: whatever it is, parsing it costs little."""

_PART = 256 * 1024
"""Bytes of a batch that are parsed before other requests get their turn: one to three milliseconds."""

_LONGEST_ROW = 2 * _PART
"""Bytes of one application in a batch."""

_BLANKS = re.compile(rb"[ \t\n\r]*")
_BETWEEN_ROWS = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*(?=\{)")

_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds the end of the JSON value at a position; numbers stay text, however many digits they have."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Validated applications of a batch request.

    Attributes
    ----------
    rows
        As they came.
    columns
        The same by field, as `valid_columns` gives them; None if only the rows are known to be valid.
    """

    rows: list[Row]
    columns: Mapping[str, Values] | None


class BodyParser:
    """Turns request bodies into applications that keep the contract.

    Parameters
    ----------
    schema
        The contract.
    limits
        ``limits`` of ``conf/serve.yaml``.
    validator
        Of the contract.
    """

    def __init__(self, schema: Schema, limits: LimitSettings, validator: SchemaValidator) -> None:
        self._schema = schema
        self._limits = limits
        self._validate = validator.validate_json
        self._most_values = _most_values(schema)
        self._shortest_row = _shortest_row(schema)
        message = f"An application has at most {len(schema.fields)} keys and no lists"
        self._too_many_values = detail((), message, "too_long")

    def application(self, body: bytes) -> Row:
        """Validate one application, or raise the `Refusal` 400."""
        if len(body) > _SMALL and _count_values(body) > 2 * self._most_values:
            raise contract_refusal([self._too_many_values])
        try:
            application: Row = self._validate(body)
        except ValidationError as error:
            raise contract_refusal(details_of(error)) from None
        # The contract admits no colon in a key or a category: there are as many as keys, repeated ones included.
        if body.count(b":") != len(application):
            raise contract_refusal(_repeated_keys(body))
        return application

    def batch(self, body: bytes) -> Iterator[Batch]:
        """Validate an array of applications part by part.

        Between two parts the caller should let other requests run. The batch is valid only if no part raises;
        a part may be empty.

        Raises
        ------
        Refusal
            400: the first `MOST_DETAILS` problems, with the index of their rows.
        """
        return _BatchParser(self, body, self._limits.batch_rows).parts()

    def plain_part(self, text: bytes) -> Batch | None:
        """Validate some rows of a batch by columns; None if they need a closer look."""
        if self.has_too_many_values(text):
            return None
        try:
            rows = orjson.loads(b"[%b]" % text)
        except orjson.JSONDecodeError:
            return None
        columns = valid_columns(rows, self._schema)
        if columns is None or text.count(b":") != sum(map(len, rows)):
            return None
        return Batch(rows, columns)

    def has_too_many_values(self, text: bytes) -> bool:
        """Whether some rows of a batch have more values than valid rows of their size.

        Without this bound a body of brackets alone would take a hundred times its size once parsed.
        """
        return _count_values(text) > (len(text) // self._shortest_row + 1) * (self._most_values + 1)


class _BatchParser:
    """Reads the body of one batch request.

    The body is cut where ``},{`` stands, about every `_PART` bytes, and each part is parsed as an array of its
    own: if all parts are valid arrays, so is the whole. A part that is not (it breaks the contract, or the cut
    fell into a string) is read row by row.
    """

    def __init__(self, parser: BodyParser, body: bytes, most_rows: int) -> None:
        self._parser = parser
        self._body = body
        self._most_rows = most_rows
        self._rows = 0
        self._details: list[Detail] = []
        self._position, self._end = _inside_of_array(body)

    def parts(self) -> Iterator[Batch]:
        """Yield the validated parts; see `BodyParser.batch`."""
        while self._position < self._end:
            yield self._plain_part() or self._row_by_row()
        if self._details:
            raise contract_refusal(self._details)

    def _plain_part(self) -> Batch | None:
        border = self._next_border()
        stop, following = (border.start() + 1, border.end()) if border else (self._end, self._end)
        if stop - self._position > _LONGEST_ROW:
            return None
        part = self._parser.plain_part(self._body[self._position : stop])
        if part is not None:
            self._count(len(part.rows))
            self._position = following
        return part

    def _next_border(self) -> re.Match[bytes] | None:
        if self._end - self._position <= _PART:
            return None
        return _BETWEEN_ROWS.search(
            self._body, self._position + _PART, min(self._end, self._position + _LONGEST_ROW)
        )

    def _row_by_row(self) -> Batch:
        """Validate some rows one by one, and note what breaks the contract."""
        window = self._window()
        # A character a byte: what matters here is ASCII, and each row is validated as UTF-8 afterwards.
        text = window.decode("latin-1")
        begin, rows, start = self._position, [], 0
        while start < len(window) and start < _PART:
            try:
                _, end = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if start == 0 or begin + len(window) == self._end:
                    self._refuse_json(self._rows, error)
                break
            rows += self._checked(window[start:end])
            start = self._next_row(begin + end) - begin
        return Batch(rows, None)

    def _window(self) -> bytes:
        window = self._body[self._position : min(self._end, self._position + _LONGEST_ROW)]
        return window[:_SMALL] if self._parser.has_too_many_values(window) else window

    def _checked(self, row: bytes) -> list[Row]:
        """Validate a row: none is given if it breaks the contract."""
        self._count(1)
        try:
            return [self._parser.application(row)]
        except Refusal as refusal:
            self._details += ({**item, "loc": [self._rows - 1, *item["loc"]]} for item in refusal.detail)
        if len(self._details) > MOST_DETAILS:
            raise contract_refusal(self._details)
        return []

    def _next_row(self, position: int) -> int:
        """Go from the end of a row to the beginning of the next, or to the end of the array."""
        self._position = _after_blanks(self._body, position)
        if self._position >= self._end:
            return self._position
        if self._body[self._position : self._position + 1] != b",":
            self._refuse_json(self._rows - 1)
        self._position = _after_blanks(self._body, self._position + 1)
        if self._position >= self._end:
            self._refuse_json(self._rows)
        return self._position

    def _refuse_json(self, row: int, error: Exception | None = None) -> NoReturn:
        if isinstance(error, RecursionError):
            message = "the values are nested too deeply"
        elif self._end - self._position > _LONGEST_ROW:
            message = f"the application does not end within {_LONGEST_ROW} bytes"
        else:
            message = getattr(error, "msg", "expected a comma or the end of the array").lower()
        message = f"Invalid JSON: {message}, in or after the application at byte {self._position}"
        raise contract_refusal([*self._details, detail((row,), message, "json_invalid")])

    def _count(self, rows: int) -> None:
        self._rows += rows
        if self._rows <= self._most_rows:
            return
        message = f"a batch holds at most {self._most_rows} applications; send it in parts"
        raise Refusal(400, message, [detail((), f"Array has more than {self._most_rows} items", "too_long")])


def _inside_of_array(body: bytes) -> tuple[int, int]:
    """Find where the first row of a JSON array starts, and where the array ends."""
    start = _after_blanks(body, 0)
    if body[start : start + 1] != b"[":
        raise contract_refusal([_why_no_array(body)])
    end = body.rfind(b"]")
    if end <= start or _after_blanks(body, end + 1) < len(body):
        raise contract_refusal([detail((), "Invalid JSON: the array does not end with a bracket", "json_invalid")])
    return _after_blanks(body, start + 1), end


def _why_no_array(body: bytes) -> Detail:
    try:
        orjson.loads(body[:_SMALL])
    except orjson.JSONDecodeError:
        if len(body) <= _SMALL:
            return detail((), "Invalid JSON", "json_invalid")
    return detail((), "Input should be a valid array", "list_type")


def _after_blanks(body: bytes, position: int) -> int:
    found = _BLANKS.match(body, position)
    return found.end() if found else position


def _count_values(text: bytes) -> int:
    """Count commas and opening brackets: there are no more values, as each follows one."""
    # Three comparisons of arrays take a third of the time of `bytes.count`.
    marks = np.frombuffer(text, dtype=np.uint8)
    return sum(int(np.count_nonzero(marks == mark)) for mark in b",[{")


def _most_values(schema: Schema) -> int:
    """Count the commas and opening brackets that a valid application can have."""
    in_categories = (
        max(_count_values(category.encode()) for category in field.categories)
        for field in schema.fields.values()
        if field.categories
    )
    return len(schema.fields) + sum(in_categories)


def _shortest_row(schema: Schema) -> int:
    """Count the bytes that a valid application has at least."""
    required = [name for name, field in schema.fields.items() if not field.optional]
    return max(2, sum(len(f'"{name}":0,') for name in required))


def _repeated_keys(body: bytes) -> list[Detail]:
    """Find the keys that stand twice in a body that is valid otherwise."""
    repeated: list[str] = []

    def notice(pairs: list[tuple[str, Any]]) -> None:
        counted = Counter(key for key, _ in pairs)
        repeated.extend(key for key, times in counted.items() if times > 1)

    json.loads(body, object_pairs_hook=notice)
    return [detail((key,), "Key must occur only once", "repeated_key") for key in repeated]
