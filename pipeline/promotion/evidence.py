"""Gather what the gate looks at: candidate and champion on the same rows, and the stored model measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import PipelineError, TrackingError
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import Matrix, monotone_constraints
from pipeline.core.promoted import promotions
from pipeline.promotion.compatibility import schema_changes
from pipeline.promotion.gate import Evidence
from pipeline.promotion.staging import Stored, reopen
from pipeline.registry.client import ModelVersion
from pipeline.registry.logged_model import DATA, SEED, TEST_SHARE, Parts, open_model
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import ingest

_TIMED = 200
"""Scorings timed; the median counts."""

_PROBED = 200
"""Holdout rows on which the monotone directions are probed."""

_STEPS = 9
"""Values of a column at which they are probed: its minimum, octiles and maximum."""

_SLACK = 1e-6
"""Rounding of float32 sums, no movement."""


@dataclass(frozen=True)
class _Opponent:
    name: str
    parts: Parts | None
    parameters: Mapping[str, str]
    failure: str = ""


def gather(
    candidate: ModelVersion, stored: Stored, champion: ModelVersion | None, data: str | None
) -> tuple[Evidence, str]:
    """Score candidate and champion, now, on the rows that neither was trained on, and measure the stored model.

    Parameters
    ----------
    stored
        The candidate, staged.
    champion
        What it is compared with, if anything is promoted.
    data
        Labelled table; None: the one that the candidate was trained on.

    Returns
    -------
    tuple
        The evidence, and one sentence on what it is based.

    Raises
    ------
    DataError
        The table is absent or breaks the candidate's contract.
    TrackingError
        The candidate's run does not record how its rows were held out.
    """
    source = data or _parameter(candidate, DATA)
    parts = _parts(stored)
    frame = ingest(source, parts.schema).frame
    held_out = _held_out(frame, parts.schema, candidate.parameters, candidate.tag)
    opponent = None if champion is None else _opponent(champion)
    theirs: Matrix | None = None
    note = ""
    if opponent is not None:
        opponent, theirs, unseen = _champion_scores(opponent, source, frame, parts.schema)
        seen, held_out = held_out & ~unseen, held_out & unseen
        if seen.any():
            note = (
                f"{seen.sum():,} more were in {opponent.name}'s training: its contract, seed or test_share differs"
            )
    rows = frame[held_out]
    matrix = FrameEncoder(parts.schema, parts.vectorizer).transform(rows)
    evidence = Evidence(
        labels=parts.schema.labels(rows),
        candidate=stored.bundle.probabilities(matrix),
        champion=None if theirs is None else theirs[held_out],
        champion_name=opponent.name if opponent else None,
        champion_failure=opponent.failure if opponent else "",
        holdout_note=note,
        groups=_groups(rows, parts.schema),
        schema_changes=_changes(opponent, parts.schema),
        is_identical=_is_identical(opponent, parts),
        monotone_breaks=_monotone_breaks(parts, matrix),
        parity=stored.bundle.golden_difference(),
        milliseconds=_milliseconds(stored),
        megabytes=stored.megabytes,
    )
    against = f" against {opponent.name}" if opponent else ""
    return evidence, f"{candidate.tag}{against}, on {len(rows):,} held-out rows of {source}"


def _parts(stored: Stored) -> Parts:
    bundle = stored.bundle
    return Parts(bundle.booster, bundle.vectorizer, bundle.schema)


def _parameter(version: ModelVersion, name: str) -> str:
    if name not in version.parameters:
        raise TrackingError(f"{version.tag}: its run does not record {name}; promote one that `train` registered")
    return version.parameters[name]


def _held_out(
    frame: pd.DataFrame, schema: Schema, parameters: Mapping[str, str], tag: str
) -> npt.NDArray[np.bool_]:
    try:
        seed, share = int(parameters[SEED]), float(parameters[TEST_SHARE])
    except (KeyError, ValueError):
        raise TrackingError(
            f"{tag}: its run does not record {SEED} and {TEST_SHARE}; promote one that `train` registered"
        ) from None
    return is_test_row(frame, schema, seed, share)


def _opponent(champion: ModelVersion) -> _Opponent:
    """Take the champion from the store if it is whole there, else from MLflow."""
    for promotion in promotions():
        if promotion.tag == champion.tag and promotion.run_id == champion.run_id:
            stored = reopen(promotion.tag, promotion.digests)
            if stored is not None:
                return _Opponent(champion.tag, _parts(stored), champion.parameters)
    try:
        return _Opponent(champion.tag, open_model(champion.uri).parts, champion.parameters)
    except PipelineError as error:
        return _Opponent(champion.tag, None, champion.parameters, str(error))


def _champion_scores(
    opponent: _Opponent, source: str, known: pd.DataFrame, known_by: Schema
) -> tuple[_Opponent, Matrix | None, npt.NDArray[np.bool_]]:
    """Score all rows of the table with the champion, through its own contract, and say which it has not seen."""
    everything = np.ones(len(known), dtype=np.bool_)
    if opponent.parts is None:
        return opponent, None, everything
    booster, vectorizer, schema = opponent.parts
    try:
        frame = known if schema == known_by else ingest(source, schema).frame
        unseen = _held_out(frame, schema, opponent.parameters, opponent.name)
        if _labels(schema) != _labels(known_by):
            raise TrackingError("it predicts another label")
        if len(frame) != len(known):
            raise TrackingError("its contract keeps other rows of the table")
    except PipelineError as error:
        failure = " ".join(str(error).split())
        return _Opponent(opponent.name, opponent.parts, opponent.parameters, failure), None, everything
    matrix = FrameEncoder(schema, vectorizer).transform(frame)
    return opponent, np.asarray(booster.inplace_predict(matrix), dtype=np.float32), unseen


def _labels(schema: Schema) -> tuple[object, ...]:
    return schema.target.name, schema.target.negative, schema.target.positive


def _changes(opponent: _Opponent | None, schema: Schema) -> tuple[str, ...]:
    if opponent is None or opponent.parts is None:
        return ()
    return schema_changes(opponent.parts.schema, schema)


def _is_identical(opponent: _Opponent | None, parts: Parts) -> bool:
    if opponent is None or opponent.parts is None:
        return False
    same_contract = opponent.parts.schema.digest == parts.schema.digest
    return same_contract and bool(opponent.parts.booster.save_raw("ubj") == parts.booster.save_raw("ubj"))


def _groups(rows: pd.DataFrame, schema: Schema) -> dict[str, npt.NDArray[np.str_]]:
    audited = [name for name, field in schema.fields.items() if field.role == "audit" and not field.is_numeric]
    return {name: rows[name].to_numpy(dtype=np.str_) for name in audited if name in rows.columns}


def _monotone_breaks(parts: Parts, matrix: Matrix) -> tuple[str, ...]:
    """Columns along which the probability moves against the contract: a booster whose columns are not these."""
    directions = monotone_constraints(parts.schema, parts.vectorizer)
    probes = matrix[np.linspace(0, len(matrix) - 1, min(_PROBED, len(matrix))).astype(np.intp)]
    return tuple(
        name
        for column, (name, direction) in enumerate(zip(parts.vectorizer.feature_names_, directions, strict=True))
        if direction and _breaks(parts, probes, column, direction, _grid(matrix[:, column]))
    )


def _grid(values: Matrix) -> Matrix:
    known = values[~np.isnan(values)]
    return np.unique(np.quantile(known, np.linspace(0, 1, _STEPS))).astype(np.float32) if len(known) else known


def _breaks(parts: Parts, probes: Matrix, column: int, direction: int, grid: Matrix) -> bool:
    if len(grid) < 2 or not len(probes):
        return False
    moved = np.repeat(probes, len(grid), axis=0)  # (rows * steps, k)
    moved[:, column] = np.tile(grid, len(probes))
    answers = np.asarray(parts.booster.inplace_predict(moved), dtype=np.float64).reshape(len(probes), len(grid))
    return bool((np.diff(answers, axis=1) * direction < -_SLACK).any())


def _milliseconds(stored: Stored) -> float:
    """Median time of encoding and scoring one application as the service does."""
    encoder = RowEncoder(stored.bundle.schema, stored.bundle.vectorizer)
    application = [stored.bundle.schema.example()]
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        stored.bundle.probabilities(encoder.transform(application))
        times.append(time.perf_counter() - start)
    return median(times) * 1000
