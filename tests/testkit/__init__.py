"""Real servers, copies of the project, filled stores and registries: for tests and benchmarks alike."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
DATA = PROJECT / "data/credit_risk.csv"
