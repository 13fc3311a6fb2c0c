"""``score``: adds probability, decision and model to a table of any length."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.contract.checks import check_columns, column_notes
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError, StoreError
from pipeline.core.model.bundle import open_bundle
from pipeline.core.policy import Policy
from pipeline.core.promoted import read_pointer, version_home
from pipeline.report import Report
from pipeline.scoring.engine import Model
from pipeline.scoring.output import APPENDED, Files, Outcome, score_file
from pipeline.scoring.request import ScoreRequest
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.sources import CSV, Source, open_source

PROMOTED = "promoted"


def run(request: ScoreRequest) -> Report:
    """Score a table.

    Raises
    ------
    PipelineError
        Table, model, cluster or target are not usable; no file is left behind.
    """
    settings = ScoreSettings.load(request.config or request.conf / "score.yaml", threads=request.threads)
    thresholds = Policy.load(request.conf / "policy.yaml").thresholds
    files = Files(request.output, request.rejects or request.output.with_suffix(".rejects.csv"))
    _check_places(request.input, files)
    source = open_source(request.input)
    model = _open_model(request.model)
    notes = _checked_columns(source, model.schema)
    return _report(score_file(source, model, settings, thresholds, files), model.name, files, notes)


def _open_model(name: str) -> Model:
    """Open what is promoted, or a model of MLflow, by an exact name."""
    if name != PROMOTED:
        from pipeline.registry.logged_model import open_model

        opened = open_model(name)
        return Model(opened.uri, *opened.parts)
    promotion = read_pointer()
    if promotion is None:
        raise StoreError(
            "nothing is promoted; run `python -m pipeline promote`, or name a model: --model models:/NAME/VERSION"
        )
    bundle = open_bundle(version_home(promotion.tag), promotion.digests)
    return Model(promotion.tag, bundle.booster, bundle.vectorizer, bundle.schema)


def _checked_columns(source: Source, contract: Schema) -> list[str]:
    """Refuse a table whose columns do not do; otherwise say what is unusual about them."""
    empty = source.schema.empty_table()
    check_columns(empty, contract, labelled=False)
    if taken := [name for name in APPENDED if name in source.schema.names]:
        raise DataError(
            f"the table has columns of the names that `score` adds: {', '.join(taken)}; rename or drop them"
        )
    return column_notes(empty, contract)


def _check_places(source: Path, files: Files) -> None:
    """Refuse to write over or into what is being read."""
    for path in files:
        target = path.resolve()
        if target == source.resolve() or source.resolve() in target.parents:
            raise DataError(f"{path}: must lie outside of the input {source}; name another file")
    if files.rejects.suffix != CSV or files.rejects.resolve() == files.output.resolve():
        raise DataError(f"{files.rejects}: the rejects need a file of their own ending in {CSV}; name another one")


def _report(outcome: Outcome, model: str, files: Files, notes: list[str]) -> Report:
    data = {
        "model": model,
        "output": None if outcome.is_useless else str(files.output),
        "scored": outcome.scored,
        "decisions": outcome.decisions,
        "rejected": outcome.rejected,
        "rejects": str(files.rejects) if outcome.rejected else None,
        "broken_rules": list(outcome.broken_rules),
        "notes": notes,
    }
    failure = f"every row breaks the contract; see {files.rejects}" if outcome.is_useless else None
    if failure and files.output.exists():
        failure += f"; {files.output} is left as it was"
    return Report("\n".join([*notes, *_lines(outcome, model, files)]), data, failure)


def _lines(outcome: Outcome, model: str, files: Files) -> list[str]:
    decided = "   ".join(f"{status} {number:,}" for status, number in outcome.decisions.items())
    lines = [f"{'model':10}{model}"]
    if not outcome.is_useless:
        lines += [f"{'scored':10}{outcome.scored:,} rows to {files.output}", f"{'decisions':10}{decided}"]
    if outcome.rejected:
        lines.append(
            f"{'rejected':10}{outcome.rejected:,} rows that break the contract, with reasons in {files.rejects}"
        )
    return [*lines, *(f"{'':10}{rule}" for rule in outcome.broken_rules)]
