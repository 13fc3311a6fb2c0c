"""Credit risk from raw rows to a promoted model, one module a step.

The journey, in the order in which the modules may import each other::

    config, schema   conf/*.yaml become frozen settings and the data contract
    ingest, split    a file becomes a validated frame, then train and test by content hash
    features         rows or frames become one dense float32 matrix through a DictVectorizer
    tune, train      an Optuna study becomes the best parameters, then a logged model version
    evaluate         labels and probabilities become metrics and figures
    gate, store      a candidate is judged, then stands verified in the BentoML store
    pointer, promote the promoted version is one atomic fact, with its history
    score            a table becomes decisions, in bulk
    decisions        what the service decided becomes a table

``python -m pipeline COMMAND --help`` documents each command.
"""

import os

# MLflow and BentoML report their usage to their makers unless told not to; "false" in a variable allows it.
for _variable in ("MLFLOW_DISABLE_TELEMETRY", "BENTOML_DO_NOT_TRACK"):
    os.environ.setdefault(_variable, "true")
