"""FastAPI by hand: a pydantic model checks, DictVectorizer encodes, the booster predicts, all in one process.

The booster scores in place with one thread. Written with ``Booster.predict(DMatrix(...))``, as most examples
have it, this service is several times slower and suffers from every other process on the machine.
"""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.peers.by_hand import features, status
from pipeline.core.model.bundle import open_bundle
from pipeline.core.promoted import read_pointer, version_home


class Application(BaseModel):
    """The contract, spelled out for this one table."""

    model_config = ConfigDict(extra="forbid")

    seniority: int = Field(ge=0, le=60)
    home: Literal["rent", "owner", "private", "ignore", "parents", "other", "unk"]
    time: int = Field(ge=1, le=120)
    age: int = Field(ge=18, le=100)
    marital: Literal["single", "married", "widow", "separated", "divorced", "unk"]
    records: Literal["yes", "no"]
    job: Literal["fixed", "partime", "freelance", "others", "unk"]
    expenses: float = Field(ge=0, le=1000)
    income: float | None = Field(None, ge=0, le=100_000)
    assets: float | None = Field(None, ge=0, le=10_000_000)
    debt: float | None = Field(None, ge=0, le=10_000_000)
    amount: float = Field(ge=1, le=100_000)
    price: float = Field(ge=1, le=1_000_000)


class Answer(BaseModel):
    """The decision, its probability of default, and the version that answered."""

    Status: str
    probability: float
    model: str


promotion = read_pointer()
if promotion is None:
    raise SystemExit("this service needs a promoted version; run: python -m pipeline promote")

bundle = open_bundle(version_home(promotion.tag), promotion.digests)
tag = promotion.tag
app = FastAPI()


@app.post("/classify")
async def classify(application: Application) -> Answer:
    matrix = bundle.vectorizer.transform(features(application.model_dump()))
    probability = float(bundle.booster.inplace_predict(matrix)[0])
    return Answer(Status=status(probability), probability=probability, model=tag)
