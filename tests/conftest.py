"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pipeline.ingest import ingest
from pipeline.schema import Schema

PROJECT = Path(__file__).parent.parent
DATA = PROJECT / "data/credit_risk.csv"


@pytest.fixture(scope="session")
def schema() -> Schema:
    """The shipped contract."""
    return Schema.load(PROJECT / "conf/schema.yaml")


@pytest.fixture(scope="session")
def applications(schema: Schema) -> pd.DataFrame:
    """The shipped data, validated."""
    return ingest(DATA, schema).frame
