"""Explains a decision in the applicant's own terms: contributions of the fields, and adverse reasons."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xgboost as xgb

from pipeline.core.model.bundle import Bundle
from pipeline.core.model.features import Matrix, field_shares

MOST_REASONS = 4
"""Adverse reasons given at most: the official interpretation of 12 CFR 1002.9(b)(2) finds more unhelpful."""

Contributions = npt.NDArray[np.float64]
Reason = dict[str, str]


class Explainer:
    """Sums a booster's contributions back to the fields that an applicant knows.

    Parameters
    ----------
    bundle
        The model; its contract gives the fields and their sentences.
    """

    def __init__(self, bundle: Bundle) -> None:
        shares = field_shares(bundle.schema, bundle.vectorizer)
        self.fields = tuple(shares)
        self._booster = bundle.booster
        self._weights = np.stack([shares[name] for name in self.fields], axis=1).astype(np.float64)  # (k, f)
        self._sentences = {name: field.reason or field.description for name, field in bundle.schema.fields.items()}

    def contributions(self, matrix: Matrix) -> tuple[Contributions, Contributions]:
        """Explain log-odds of default by fields.

        Parameters
        ----------
        matrix
            Encoded applications, shape (n, k).

        Returns
        -------
        contributions, bias
            Shapes (n, f) and (n,), in log-odds. Each row of contributions and its bias sum to the log-odds of
            the row's probability. They are Shapley values of the trees (Lundberg et al. 2018, arXiv:1802.03888),
            in which one-hots and ratios are summed back to fields by `pipeline.core.model.features.field_shares`.
        """
        raw = self._booster.predict(
            xgb.DMatrix(matrix, nthread=1), pred_contribs=True, validate_features=False
        ).astype(np.float64)  # (n, k + 1): the last column is the bias
        return raw[:, :-1] @ self._weights, raw[:, -1]

    def reasons(self, contributions: Contributions) -> list[Reason]:
        """Name what pushed one application towards default, strongest first.

        Parameters
        ----------
        contributions
            One row, shape (f,), in log-odds.

        Returns
        -------
        list
            Up to `MOST_REASONS` of ``{"field", "reason"}``; the sentence comes from the contract.
        """
        strongest = np.argsort(-contributions, kind="stable")[:MOST_REASONS]
        return [
            {"field": self.fields[position], "reason": self._sentences[self.fields[position]]}
            for position in strongest
            if contributions[position] > 0
        ]

    def document(self, matrix: Matrix) -> dict[str, Any]:
        """Explain one application, shape (1, k), as plain values."""
        contributions, bias = self.contributions(matrix)
        row = contributions[0]
        return {
            "log_odds": float(bias[0] + row.sum()),
            "bias": float(bias[0]),
            "contributions": dict(zip(self.fields, row.tolist(), strict=True)),
            "reasons": self.reasons(row),
        }
