"""Credit risk, from raw rows to a promoted model.

The packages, from the top down; each imports only those below it::

    __main__        the commands: flags, one step, a report
    training        tune, train, evaluate and register a candidate
    promotion       judge a candidate, promote it, roll back, follow MLflow
    scoring         decide on every row of a table
    monitoring      read what the service decided
    packaging       build the Bento that serves
    tables, registry, evaluation, cluster    what several commands share
    core            all that deciding on an application needs; the service imports this and nothing else

``python -m pipeline COMMAND --help`` documents each command.
"""

import os

# MLflow and BentoML report their usage to their makers unless told not to; "false" in a variable allows it.
for _variable in ("MLFLOW_DISABLE_TELEMETRY", "BENTOML_DO_NOT_TRACK"):
    os.environ.setdefault(_variable, "true")
