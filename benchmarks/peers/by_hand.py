"""The mapping that DictVectorizer takes, written by hand for this one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LEFT_OUT = frozenset({"marital"})
_NAN = math.nan


def features(application: Mapping[str, Any]) -> dict[str, Any]:
    """Fields and ratios of ``conf/schema.yaml``, spelled out; missing numbers are NaN."""
    row = {name: value for name, value in application.items() if name not in _LEFT_OUT}
    row["income"] = income = row.get("income") or _NAN
    row["assets"] = assets = _stated(row.get("assets"))
    row["debt"] = debt = _stated(row.get("debt"))
    amount, price, expenses = row["amount"], row["price"], row["expenses"]
    row["installment"] = installment = amount / row["time"]
    row["amount_to_price"] = amount / price
    row["down_payment"] = price - amount
    row["installment_to_income"] = installment / income
    row["coverage"] = (income - expenses) / installment
    row["surplus"] = income - expenses - installment
    row["net_worth"] = assets - debt
    row["debt_to_assets"] = debt / assets if assets else _NAN
    row["expenses_to_income"] = expenses / income
    return row


def status(probability: float) -> str:
    """Decide on a probability of default in [0, 1]; the thresholds are written into the code."""
    if probability > 0.5:
        return "DECLINED"
    return "MAYBE" if probability > 0.3 else "APPROVED"


def _stated(value: float | None) -> float:
    return _NAN if value is None else value
