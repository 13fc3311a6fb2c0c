"""COMMAND decisions: the service's decision log in, a DataFrame out, for monitoring and audits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pandas as pd
import pyarrow as pa

from pipeline.core.errors import DataError
from pipeline.core.policy import STATUSES
from pipeline.core.record import DECISION_FILE, decision_log_settings
from pipeline.monitoring.request import DecisionsRequest
from pipeline.report import Report
from pipeline.tables.sinks import open_sink

INPUT = "input."
"""Prefix of the columns that hold what the applicant stated."""


@dataclass(frozen=True)
class Decisions:
    """What the service decided.

    Attributes
    ----------
    frame
        One row a decision, oldest first: time (UTC), request_id, row (of a batch request), model, digest, schema,
        maybe_above, declined_above, probability (of default, in [0, 1]), status, and, where they were recorded,
        reasons, trace_id and one ``input.FIELD`` for each field.
    broken_lines
        Lines that a crash cut short.
    """

    frame: pd.DataFrame
    broken_lines: int


def run(request: DecisionsRequest) -> Report:
    """Read the decision log, and write it as one table if asked to."""
    found = read_decisions(_folder(request), since=request.since, model=request.model)
    if request.output:
        _write(found.frame, request.output)
    return _report(found, request.output)


def read_decisions(folder: str | Path, since: datetime | None = None, model: str | None = None) -> Decisions:
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
    files = sorted(Path(folder).glob(DECISION_FILE.format("*")))
    if not files:
        raise DataError(
            f"{folder}: holds no decision log; name decision_log.folder of the service's conf/serve.yaml"
        )
    earliest = _utc(since).isoformat() if since else ""
    records: list[dict[str, Any]] = []
    broken = 0
    for line in _lines(files):
        record = _parse(line)
        if record is None:
            broken += 1
        elif record["time"] >= earliest and model in (None, record["model"]):
            records.append(_flat(record))
    return Decisions(_frame(records), broken)


def _lines(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as lines:
            yield from lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "time" in record else None


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    thresholds = record.pop("thresholds", {})
    inputs = record.pop("inputs", {})
    return {**record, **thresholds, **{f"{INPUT}{name}": value for name, value in inputs.items()}}


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(records)
    if frame.empty:
        return frame
    frame["time"] = pd.to_datetime(frame["time"], format="ISO8601", utc=True)
    # Files are those of workers: only the time puts their lines in order.
    return frame.sort_values("time", kind="stable", ignore_index=True)


def _folder(request: DecisionsRequest) -> Path:
    if request.folder:
        return request.folder
    return request.conf.parent / decision_log_settings(request.conf / "serve.yaml").folder


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _write(frame: pd.DataFrame, path: Path) -> None:
    plain = frame.drop(columns="reasons", errors="ignore") if path.suffix == ".csv" else frame
    table = pa.Table.from_pandas(plain, preserve_index=False)
    with open_sink(path, table.schema) as sink:
        for batch in table.to_batches():
            sink.write(batch)


def _report(found: Decisions, output: Path | None) -> Report:
    frame = found.frame
    data: dict[str, Any] = {"decisions": len(frame), "broken_lines": found.broken_lines, "models": _models(frame)}
    lines = [f"{len(frame)} decisions"]
    if len(frame):
        data |= {"from": frame["time"].min().isoformat(), "to": frame["time"].max().isoformat()}
        lines[0] += f" from {data['from']} to {data['to']}"
    for tag, told in data["models"].items():
        shares = ", ".join(f"{status} {told['statuses'][status] / told['decisions']:.1%}" for status in STATUSES)
        mean = f"mean probability of default {told['mean_probability']:.3f}"
        lines.append(f"  {tag}: {told['decisions']} decisions: {shares}; {mean}")
    if found.broken_lines:
        lines.append(f"  {found.broken_lines} lines were cut short by a crash and left out")
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
