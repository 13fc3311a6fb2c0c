"""Checks of a table against the contract: which columns it lacks, which rows break which rule."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.core.contract import columns
from pipeline.core.contract.columns import Column, Table
from pipeline.core.contract.schema import Field, Schema, Target
from pipeline.core.errors import DataError

Rows = npt.NDArray[np.bool_]

_FIRST = 5
"""Rows named of those that break a rule."""


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
    rows: Rows

    def __str__(self) -> str:
        return f"{self.column}: {self.rule}"


@dataclass
class _Breach:
    """How many rows break a rule, and the numbers of the first."""

    count: int = 0
    first: list[int] = field(default_factory=list)


class BrokenRules:
    """The rules that a table breaks, collected over its batches: how many rows break each, and which first."""

    def __init__(self) -> None:
        self._breaches: dict[str, _Breach] = {}

    def __bool__(self) -> bool:
        return bool(self._breaches)

    def add(self, found: Iterable[Violation], numbers: npt.NDArray[np.integer] | None = None) -> None:
        """Add what a batch breaks.

        Parameters
        ----------
        found
            As `violations` gives it.
        numbers
            The rows' numbers in the table: shape (n,); None: the batch is the table, and rows count from 1.
        """
        for violation in found:
            positions = np.flatnonzero(violation.rows)
            self.add_rows(str(violation), positions + 1 if numbers is None else numbers[positions])

    def add_rows(self, rule: str, numbers: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Add rows that break one rule, by their numbers in the table."""
        breach = self._breaches.setdefault(rule, _Breach())
        breach.count += len(numbers)
        breach.first += [int(number) for number in numbers[: _FIRST - len(breach.first)]]

    def lines(self) -> list[str]:
        """One line for each rule, such as ``age: must be in [18, 100]: 2 rows, first at 4, 8``."""
        return [
            f"{rule}: {breach.count} {'row' if breach.count == 1 else 'rows'}, "
            f"first at {', '.join(map(str, breach.first))}"
            for rule, breach in self._breaches.items()
        ]

    def raise_any(self, source: str) -> None:
        """Raise `DataError` if a rule is broken; `source` names the table."""
        if not self:
            return
        lines = "\n".join(f"  {line}" for line in self.lines())
        raise DataError(f"{source}: breaks the contract (rows are counted from 1, without the header)\n{lines}")


def check_columns(table: Table, schema: Schema, *, labelled: bool) -> None:
    """Raise `DataError` if a column that the contract requires is absent.

    Parameters
    ----------
    labelled
        Whether the target's column is required too.
    """
    present = columns.names(table)
    required = [name for name, item in schema.fields.items() if not item.optional]
    required += [schema.target.name] if labelled else []
    absent = [name for name in required if name not in present]
    if not absent:
        return
    unknown = _unknown(present, schema)
    hint = f"; columns unknown to the contract: {_with_guesses(unknown, absent)}" if unknown else ""
    raise DataError(
        f"required columns are absent: {', '.join(absent)}{hint}; rename them, or adapt the schema file"
    )


def column_notes(table: Table, schema: Schema) -> list[str]:
    """Say what is unusual about the columns of a table that `check_columns` accepts.

    An optional column that is absent may be a column whose name is misspelt: then every applicant's value would
    count as missing, without an error.
    """
    present = columns.names(table)
    absent = [name for name in schema.fields if name not in present]
    unknown = _unknown(present, schema)
    notes = []
    if unknown:
        notes.append(f"ignored columns that the contract does not know: {_with_guesses(unknown, absent)}")
    if absent:
        notes.append(f"optional columns are absent, so their values count as missing: {', '.join(absent)}")
    return notes


def violations(table: Table, schema: Schema) -> Iterator[Violation]:
    """Check every present field of a table (pandas or Arrow) against the contract, column by column.

    Optional columns may be absent.
    """
    for name, item in schema.fields.items():
        column = columns.pick(table, name)
        if column is None:
            continue
        check = _numeric_violations if item.is_numeric else _category_violations
        for rule, rows in check(column, item):
            if rows.any():
                yield Violation(name, rule, rows)


def label_violations(column: Column, target: Target) -> Iterator[Violation]:
    """Check a column of labels; an empty one breaks the rule, too."""
    strange = ~(columns.equals(column, target.negative) | columns.equals(column, target.positive))
    if strange.any():
        yield Violation(target.name, f"must be {target.negative} or {target.positive}", strange)


def _unknown(present: Sequence[str], schema: Schema) -> list[str]:
    return [name for name in present if name not in {*schema.fields, schema.target.name}]


def _with_guesses(unknown: Sequence[str], absent: Sequence[str]) -> str:
    """Name the unknown columns, each with the absent one that it may be: ``incom (did you mean income?)``."""
    folded = {name.casefold(): name for name in absent}
    return ", ".join(_with_guess(name, folded) for name in unknown)


def _with_guess(name: str, folded: dict[str, str]) -> str:
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"{name} (did you mean {folded[close[0]]}?)" if close else name


def _numeric_violations(column: Column, item: Field) -> Iterator[tuple[str, Rows]]:
    empty = columns.is_empty(column)
    if columns.is_boolean(column):
        yield "must be a number, not true or false", ~empty
        return
    values = columns.as_numbers(column)
    numeric = ~np.isnan(values)
    if not item.optional:
        yield "must not be missing", empty
    yield "must be a number", ~empty & ~numeric
    low, high = item.bounds
    yield f"must be in [{low:g}, {high:g}]", numeric & ((values < low) | (values > high))
    if item.kind == "integer":
        yield "must be a whole number", numeric & np.isfinite(values) & (values != np.floor(values))


def _category_violations(column: Column, item: Field) -> Iterator[tuple[str, Rows]]:
    empty = columns.is_empty(column)
    if not item.optional:
        yield "must not be missing", empty
    known = columns.positions(column, item.categories) >= 0
    yield f"must be one of {', '.join(item.categories)}", ~empty & ~known
