"""The course's service on BentoML's first API, with a runner in a process of its own."""

from __future__ import annotations

from typing import Any

import bentoml
from bentoml.io import JSON

from benchmarks.peers.by_hand import features, status
from pipeline.core.promoted import read_pointer

promotion = read_pointer()
if promotion is None:
    raise SystemExit("the tutorial's service needs a promoted version; run: python -m pipeline promote")

model = bentoml.models.get(promotion.tag)
vectorizer = model.custom_objects["DictVectorizer"]
runner = model.to_runner()

svc = bentoml.legacy.Service("credit_risk_tutorial", runners=[runner])


@svc.api(input=JSON(), output=JSON())
async def classify(application: dict[str, Any]) -> dict[str, Any]:
    vector = vectorizer.transform(features(application))
    prediction = await runner.predict.async_run(vector)
    probability = float(prediction[0])
    return {"Status": status(probability), "probability": probability}
