"""The decisions command: read the service's decision log into a DataFrame, for monitoring and audits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import DataError
from pipeline.core.policy import STATUSES
from pipeline.core.record import DECISION_FILE, decision_log_settings
from pipeline.monitoring.decision_record import DecisionRecord
from pipeline.monitoring.request import DecisionsRequest
from pipeline.report import Report
from pipeline.tables.sinks import open_sink

INPUT = "input."
"""Prefix of the columns that hold what the applicant stated."""


_VALIDATOR = TypeAdapter(DecisionRecord)

_ALWAYS = ["time", "request_id", "model", "probability", "status"]
"""Columns that a frame without a row has, too."""


@dataclass(frozen=True)
class LoggedDecisions:
    """What the service decided.

    Attributes
    ----------
    frame
        One row a decision, oldest first: time (UTC), request_id, row (of a batch request), model, digest, schema,
        maybe_above, declined_above, probability (of default, in [0, 1]), status, and, where they were recorded,
        reasons, trace_id and one ``input.FIELD`` for each field.
    broken_lines
        Lines that are no decision: cut short by a crash, or damaged.
    first_broken
        Position of the first of them, such as ``decisions-0.jsonl, line 7``; None if there are none.
    """

    frame: pd.DataFrame
    broken_lines: int
    first_broken: str | None


def run(request: DecisionsRequest) -> Report:
    """Read the decision log, and write it as one table if asked to."""
    found = read_decisions(_folder(request), since=request.since, model=request.model)
    if request.output:
        _write(found.frame, request.output)
    return _report(found, request.output)


def read_decisions(folder: str | Path, since: datetime | None = None, model: str | None = None) -> LoggedDecisions:
    """Read every file of a decision log.

    Parameters
    ----------
    folder
        ``decision_log.folder`` of the service.
    since
        Leave out what is older; without a time zone it is UTC.
    model
        Only decisions of this tag, such as ``credit_risk_model:v3``.

    Raises
    ------
    DataError
        The folder holds no decision log.
    """
    files = [path for path in sorted(Path(folder).glob(DECISION_FILE.format("*"))) if path.is_file()]
    if not files:
        raise DataError(
            f"{folder}: holds no decision log; name the folder in decision_log.folder of the service's serve.yaml"
        )
    earliest = _aware(since) if since else None
    records: list[dict[str, Any]] = []
    broken: list[str] = []
    for place, line in _lines(files):
        record = _parse(line)
        if record is None:
            broken.append(place)
        elif (earliest is None or record["time"] >= earliest) and model in (None, record["model"]):
            records.append(_flat(record))
    return LoggedDecisions(_frame(records), len(broken), broken[0] if broken else None)


def _lines(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    yield f"{path.name}, line {number}", line
        except FileNotFoundError:
            continue  # the service has just rotated it away
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(line: bytes) -> DecisionRecord | None:
    try:
        return _VALIDATOR.validate_json(line)
    except ValidationError:
        return None


def _flat(record: DecisionRecord) -> dict[str, Any]:
    values: dict[str, Any] = dict(record)
    thresholds = values.pop("thresholds", {})
    inputs = values.pop("inputs", {})
    return {**values, **thresholds, **{f"{INPUT}{name}": value for name, value in inputs.items()}}


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(records) if records else pd.DataFrame(columns=_ALWAYS)
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    # Files are those of workers: only the time puts their lines in order.
    return frame.sort_values("time", kind="stable", ignore_index=True)


def _folder(request: DecisionsRequest) -> Path:
    if request.folder:
        return request.folder
    return request.conf.parent / decision_log_settings(request.conf / "serve.yaml").folder


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _write(frame: pd.DataFrame, path: Path) -> None:
    plain = frame.drop(columns="reasons", errors="ignore") if path.suffix == ".csv" else frame
    table = pa.Table.from_pandas(plain.apply(_of_one_type), preserve_index=False)
    with open_sink(path, table.schema) as sink:
        for batch in table.to_batches():
            sink.write(batch)


def _of_one_type(column: pd.Series) -> pd.Series:
    """Make a column text whose values are numbers under one contract and text under another."""
    is_text = column.map(lambda value: isinstance(value, str))
    if column.dtype != object or not is_text.any() or (is_text | column.isna()).all():
        return column
    return column.map(lambda value: value if pd.isna(value) else str(value))


def _report(found: LoggedDecisions, output: Path | None) -> Report:
    frame = found.frame
    data: dict[str, Any] = {"decisions": len(frame), "broken_lines": found.broken_lines, "models": _models(frame)}
    lines = [f"{len(frame)} decisions"]
    if len(frame):
        data |= {"from": frame["time"].min().isoformat(), "to": frame["time"].max().isoformat()}
        lines[0] += f" from {data['from']} to {data['to']}"
    for tag, facts in data["models"].items():
        shares = ", ".join(f"{status} {facts['statuses'][status] / facts['decisions']:.1%}" for status in STATUSES)
        mean = f"mean probability of default {facts['mean_probability']:.3f}"
        lines.append(f"  {tag}: {facts['decisions']} decisions: {shares}; {mean}")
    if found.broken_lines:
        count = (
            "1 line is no decision and was"
            if found.broken_lines == 1
            else f"{found.broken_lines} lines are no decisions and were"
        )
        lines.append(f"  {count} left out: cut short by a crash or damaged, the first at {found.first_broken}")
    if output:
        lines.append(f"written to {output}")
    return Report("\n".join(lines), data)


def _models(frame: pd.DataFrame) -> dict[str, Any]:
    if frame.empty:
        return {}
    return {
        str(tag): {
            "decisions": len(group),
            "statuses": {status: int((group["status"] == status).sum()) for status in STATUSES},
            "mean_probability": float(group["probability"].mean()),
        }
        for tag, group in frame.groupby("model")
    }
