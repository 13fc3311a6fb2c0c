"""Attacks on the data contract: what the gate, `score` and the grammar of ratios let pass."""

from __future__ import annotations

import gzip
import io
import random
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import yaml
from pydantic import ValidationError

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab, one_line
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import PipelineError
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.tables.labelled import ingest
from tests.testkit import DATA
from tests.testkit.registry import GOOD, NARROWER, Machine, log_version

CHANGES: dict[str, dict[str, Any]] = {
    "marital: role audit became feature": {"marital": {"role": "feature"}},
    "amount: direction increasing became decreasing": {"amount": {"monotone": "decreasing"}},
    "debt: unit thousand pesetas became euro": {"debt": {"unit": "euro"}},
}


def gate(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    versions = _log_changed(machine, lab)
    for said, version in versions.items():
        promote = ("promote", "--version", str(version))
        refused = machine.run(*promote)
        tally.count(one_line(refused) and said in refused.err, f"{said}: exit {refused.code}: {refused.err}")
        unreasoned = machine.run(*promote, "--allow-schema-change")
        tally.count(one_line(unreasoned) and "reason" in unreasoned.err, f"{said}, no reason: {unreasoned.err}")
        allowed = machine.run(*promote, "--allow-schema-change", "--reason", "attack", "--dry-run")
        tally.count(allowed.code == 0 and said in allowed.out, f"{said}, allowed: {allowed.out} {allowed.err}")
        tally.count("auc_worse_by" in allowed.out, f"{said}: the champion was not compared: {allowed.out}")
    same = machine.run("promote", "--version", str(max(versions.values()) + 1), "--dry-run")
    tally.count("identical" in same.out, f"the same model again: {same.out}")


def scoring(lab: Lab, tally: Tally) -> None:
    machine, folder = lab.machine(), lab.folder()
    table, output = pd.read_csv(DATA), folder / "out.csv"
    output.write_text("the table of last month")
    (folder / "in.csv").write_text(f"{DATA.read_text().splitlines()[0]}\n1,2\n3,4\n")
    refused = _score(machine, folder / "in.csv", output)
    tally.count(
        one_line(refused) and "last month" in output.read_text(), f"all rejected: {refused.code} {refused.err}"
    )
    for name in (name for name, field in lab.schema.fields.items() if field.optional):
        table.rename(columns={name: name[:-1]}).to_csv(folder / "in.csv", index=False)
        told = _score(machine, folder / "in.csv", output).out
        tally.count(f"did you mean {name}?" in told and "are absent" in told, f"score without {name}: {told}")
        notes = " ".join(ingest(folder / "in.csv", lab.schema).notes)
        tally.count(f"did you mean {name}?" in notes and "are absent" in notes, f"train without {name}: {notes}")
    (folder / "in.csv.gz").write_bytes(gzip.compress(DATA.read_bytes()))
    scored = _score(machine, folder / "in.csv.gz", output)
    tally.count(scored.code == 0 and len(pd.read_csv(output)) == len(table), f".csv.gz: {scored.err}")
    tally.count(
        len(ingest(folder / "in.csv.gz", lab.schema).frame) == len(lab.applications), ".csv.gz in training"
    )
    for name in ("probability", "decision", "model"):
        document = lab.schema.document()
        document["fields"][name] = document["fields"]["debt"]
        (folder / "schema.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        refused = machine.run("train", "--schema", str(folder / "schema.yaml"))
        tally.count(one_line(refused) and name in refused.err, f"a field named {name}: {refused.err}")


def ratios(lab: Lab, tally: Tally) -> None:
    for text in HOSTILE:
        tally.count(_is_refused(_with_ratio(lab.schema, text)), f"{text[:80]} is accepted")
    generator, accepted = lab.random(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1500):
            text = _expression(generator)
            try:
                schema = Schema.model_validate(_with_ratio(lab.schema, text))
            except ValidationError:
                tally.count(held=True, what=text)
                continue
            accepted += 1
            tally.count(_means_the_same(schema, lab), f"{text} differs between rows and table")
    tally.note(f"{accepted} random expressions accepted, each the same by rows and by table")


HOSTILE = [
    *(
        "amount * 1e999",
        "amount * -1e999",
        "1e999 / amount",
        f"amount * {'9' * 400}",
        "amount ** 2",
        "amount // 2",
    ),
    *(
        "amount % 2",
        "amount @ 2",
        "amount if 1 else 2",
        "[amount]",
        "amount.real",
        "__import__('os')",
        "amount, 1",
    ),
    *("lambda: amount", "amount := 1", "amount; 1", "amount\n+1; x", "f'{amount}'", "1 + 1", "", " ", "(" * 500),
    *("-" * 5000 + "amount", "amount" + " + amount" * 5000, "amount + 1j"),
    *(
        "amount + True",
        "amount + 'a'",
        "nowhere + 1",
        "amount + \0",
        "é + 1",
        "amount[0]",
        "amount(1)",
        "await amount",
    ),
]

ATTACKS = [
    Attack("gate", "A change of role, direction or unit needs --allow-schema-change --reason", gate),
    Attack("scoring", "score keeps the old output if all is rejected, and tells a misspelt column", scoring),
    Attack("ratios", "A ratio that cannot be evaluated is refused by the contract", ratios),
]


def _log_changed(machine: Machine, lab: Lab) -> dict[str, int]:
    """Register a version for each change, and the good one once more after them."""
    mlflow.set_tracking_uri(machine.tracking)
    try:
        mlflow.set_experiment("registry")
        with redirect_stderr(io.StringIO()):  # MLflow tells of each version
            for changes in CHANGES.values():
                document = lab.schema.document()
                for name, change in changes.items():
                    document["fields"][name] |= change
                log_version(Schema.model_validate(document), lab.applications, GOOD, 60)
            log_version(lab.schema, lab.applications, GOOD, 60)
        return {said: version for version, said in enumerate(CHANGES, NARROWER + 1)}
    finally:
        mlflow.set_tracking_uri(None)


def _score(machine: Machine, source: Path, target: Path) -> Any:
    return machine.run("score", "--input", str(source), "--output", str(target))


def _is_refused(document: dict[str, Any]) -> bool:
    try:
        Schema.model_validate(document)
    except (ValidationError, PipelineError):
        return True
    return False


def _with_ratio(schema: Schema, text: str) -> dict[str, Any]:
    document = schema.document()
    return {
        **document,
        "ratios": {**document["ratios"], "attack": {"expression": text, "description": "An attack."}},
    }


def _expression(generator: random.Random) -> str:
    """Arithmetic, or nearly."""
    leaves = [
        "amount",
        "income",
        "time",
        "debt",
        "assets",
        "0",
        "1",
        "-0.0",
        "1e308",
        "5e-324",
        "1e999",
        "marital",
        "x",
    ]
    parts = []
    for _ in range(generator.randrange(1, 8)):
        leaf = generator.choice(leaves[:5] if generator.random() < 0.7 else leaves)
        parts += [
            generator.choice(["", "", "-", "("]) + leaf,
            generator.choice(["+", "-", "*", "/", "/", ") *", "**"]),
        ]
    text = " ".join(parts[:-1])
    missing = text.count("(") - text.count(")")
    return text + ")" * missing if generator.random() < 0.9 else text


def _means_the_same(schema: Schema, lab: Lab) -> bool:
    vectorizer = make_vectorizer(schema)
    rows = RowEncoder(schema, vectorizer).transform(lab.rows[:20])
    table = FrameEncoder(schema, vectorizer).transform(lab.applications.head(20))
    return bool(np.array_equal(rows.view(np.uint32), table.view(np.uint32)) and not np.isinf(rows).any())
