"""Quality of the default recipe: 5 x 5 cross-validation of trial 0 on all rows.

    python -m benchmarks.recipe

The number of boosting rounds of each outer fold is decided by early stopping inside its own training rows, so
nothing of a fold's validation rows enters its model.
"""

from __future__ import annotations

import argparse

import numpy as np
import xgboost as xgb
from sklearn.model_selection import RepeatedStratifiedKFold

from pipeline.core.contract.schema import Schema
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.core.settings import conf_folder
from pipeline.evaluation.metrics import metrics
from pipeline.tables.labelled import ingest
from pipeline.training.fitting import xgboost_parameters
from pipeline.training.folds import FoldSet, FoldSettings, quantised
from pipeline.training.settings import TrainSettings

LIMITS = {"auc": (0.850, 1), "brier": (0.136, -1), "log_loss": (0.420, -1), "ks": (0.56, 1)}
"""Metric → limit, and 1 where more is better."""


def main() -> None:
    parser = argparse.ArgumentParser(description="5 x 5 cross-validation of the default recipe.")
    parser.add_argument("--config", default="conf/train.yaml")
    settings = TrainSettings.load(parser.parse_args().config)
    schema = Schema.load(conf_folder() / "schema.yaml")
    frame = ingest(settings.data, schema).frame
    vectorizer = make_vectorizer(schema)
    matrix, labels = FrameEncoder(schema, vectorizer).transform(frame), schema.labels(frame)
    fixed = xgboost_parameters(settings, schema, vectorizer)
    inner = FoldSettings(fixed, settings.folds, settings.seed, settings.max_rounds, settings.early_stopping_rounds)
    found = []
    for train, valid in RepeatedStratifiedKFold(n_splits=5, n_repeats=5, random_state=settings.seed).split(
        matrix, labels
    ):
        rounds = FoldSet(matrix[train], labels[train], inner).evaluate(settings.first_parameters, threads=1).rounds
        parameters = {**fixed, **settings.first_parameters, "nthread": 1}
        booster = xgb.train(parameters, quantised(matrix[train], labels[train], fixed, 1), rounds)
        found.append(metrics(labels[valid], booster.inplace_predict(matrix[valid])))
    report(found, len(labels))


def report(found: list[dict[str, float]], rows: int) -> None:
    print(f"default recipe, 5 x 5 cross-validation on {rows} rows: mean and standard deviation over 25 folds")
    for name in found[0]:
        values = [scores[name] for scores in found]
        line = f"  {name:22}{np.mean(values):8.4f} ± {np.std(values):.4f}"
        if name in LIMITS:
            limit, sign = LIMITS[name]
            verdict = "ok" if (np.mean(values) - limit) * sign >= 0 else "MISSED"
            line += f"   {'>=' if sign > 0 else '<='} {limit:.3f}  {verdict}"
        print(line)


if __name__ == "__main__":
    main()
