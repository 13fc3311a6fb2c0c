"""The commands: ``python -m pipeline COMMAND`` parses flags, runs one step and prints its report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import PipelineError
from pipeline.core.settings import CONF_VARIABLE, parse_settings
from pipeline.report import Report

DEFAULT = "default"
"""MLproject cannot leave a parameter out: this word means that the flag is not given."""


class Step(NamedTuple):
    """What a command runs: a function that takes a request of one class and returns a report.

    They are named, not imported: mlflow and optuna cost seconds that ``status`` must not pay.
    """

    function: str
    request: str

    def run(self, options: argparse.Namespace) -> Report:
        """Make the request of the flags that were given, and run the step."""
        request_class = _imported(self.request)
        given = {name: getattr(options, name, None) for name in request_class.model_fields}
        values = {name: value for name, value in given.items() if value is not None}
        report: Report = _imported(self.function)(parse_settings(request_class, values, source=options.command))
        return report


STEPS = {
    "train": Step("training.command:run", "training.request:TrainRequest"),
    "promote": Step("promotion.commands:promote", "promotion.request:PromoteRequest"),
    "rollback": Step("promotion.commands:rollback", "promotion.request:RollbackRequest"),
    "status": Step("promotion.status:status", "promotion.request:StatusRequest"),
    "sync": Step("promotion.following:sync", "promotion.request:SyncRequest"),
    "score": Step("scoring.command:run", "scoring.request:ScoreRequest"),
    "package": Step("packaging.bento:run", "packaging.request:PackageRequest"),
    "image": Step("packaging.image:run", "packaging.request:ImageRequest"),
    "decisions": Step("monitoring.log_reader:run", "monitoring.request:DecisionsRequest"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns
    -------
    int
        0 done; 1 refused or failed, with one readable message on stderr. Bad usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        report = STEPS[options.command].run(options)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print(f"error: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130
    print(json.dumps(report.data) if options.json else report.text)
    if report.failure:
        print(f"error: {report.failure}", file=sys.stderr)
    return 1 if report.failure else 0


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"pipeline.{module}"), name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Credit risk from tuning to served decisions."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    _train(_command(commands, "train", "tune, train, evaluate and register a candidate"))
    _promote(_command(commands, "promote", "judge a candidate and, if it passes, promote it"))
    _rollback(_command(commands, "rollback", "return to an earlier promoted version"))
    _command(commands, "status", "show what is promoted, and the history")
    _sync(_command(commands, "sync", "make this machine follow MLflow's champion"))
    _score(_command(commands, "score", "decide on every row of a table"))
    _package(_command(commands, "package", "build a Bento that serves the promoted version"))
    _image(_command(commands, "image", "build a container image that serves the promoted version"))
    _decisions(_command(commands, "decisions", "read the service's decision log"))
    return parser


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.add_argument(
        "--conf",
        type=_optional(Path),
        metavar="DIR",
        help=f"folder of the settings, contract and policy (default: ${CONF_VARIABLE}, else conf/)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_optional(text: str) -> Any:
        return None if text == DEFAULT else parse(text)

    parse_optional.__name__ = parse.__name__  # argparse names the type in its error
    return parse_optional


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, received {text}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a time above 0 seconds, received {text}")
    return number


def _settings_file(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--config", type=_optional(Path), metavar="FILE", help=f"settings (default: {name} of the conf folder)"
    )


def _train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=_optional(str), metavar="PATH", help="CSV, Parquet or folder of Parquet (conf: data)")
    add(
        "--schema",
        dest="schema_file",
        type=_optional(Path),
        metavar="FILE",
        help="data contract (default: schema.yaml of the conf folder)",
    )
    _settings_file(parser, "train.yaml")
    add("--trials", type=_optional(_positive), metavar="N", help="total trials of the study (conf: trials)")
    add("--workers", type=_optional(_positive), metavar="N", help="parallel evaluations (conf: workers)")
    add("--study", type=_optional(str), metavar="NAME", help="study to start or resume (conf: study)")
    add("--seed", type=_optional(int), metavar="N", help="seed of everything random (conf: seed)")


def _promote(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--version",
        type=_optional(_positive),
        metavar="N",
        help="version of the registered model (default: the newest trained)",
    )
    which.add_argument(
        "--run-id", type=_optional(str), metavar="ID", help="the version that this MLflow run registered"
    )
    which.add_argument("--best", action="store_true", help="the version with the lowest test log loss")
    _settings_file(parser, "promote.yaml")
    add = parser.add_argument
    add("--data", type=_optional(str), metavar="PATH", help="labelled table that judges (conf: data)")
    add("--dry-run", action="store_true", help="judge and change nothing")
    add("--force", action="store_true", help="promote although the gate refuses; needs --reason")
    add("--reason", metavar="TEXT", help="why; kept in the history")
    add(
        "--allow-schema-change",
        action="store_true",
        help="accept a changed data contract; needs --reason",
    )


def _rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=_optional(_positive), metavar="N", help="version (default: the previously promoted one)"
    )
    parser.add_argument("--reason", metavar="TEXT", help="why; kept in the history")
    _settings_file(parser, "promote.yaml")


def _sync(parser: argparse.ArgumentParser) -> None:
    _settings_file(parser, "promote.yaml")
    parser.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="keep following, and look again after so many seconds"
    )


def _score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help="CSV (.csv, .csv.gz), Parquet, or a folder of Parquet",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="CSV or Parquet, by its suffix")
    add("--model", metavar="MODEL", help="promoted (default), models:/NAME/VERSION or runs:/RUN/model")
    _settings_file(parser, "score.yaml")
    add("--threads", type=_optional(_positive), metavar="N", help="batches scored at once (conf: threads)")
    add(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="CSV of the rows that break the contract (default: OUTPUT.rejects.csv)",
    )


def _package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unpinned", action="store_true", help="no model inside: it serves a mounted store only")


def _image(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--builder", choices=("docker", "podman", "buildah"), help="default: the first of them that works")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bento", metavar="TAG", help="build from this Bento (default: from a new one)")
    source.add_argument("--unpinned", action="store_true", help="no model inside: it serves a mounted store only")
    add("--base", metavar="IMAGE", help="image with Python to build on (default: that of the container file)")
    add("--tag", metavar="NAME", help="name of the image (default: the Bento's tag)")
    add(
        "--option",
        dest="options",
        action="append",
        metavar="NAME=VALUE",
        help="a further option of the builder, such as network=host; may be given several times",
    )


def _decisions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", type=Path, metavar="DIR", help="decision log (default: decision_log.folder of serve.yaml)")
    add("--since", type=datetime.fromisoformat, metavar="TIME", help="leave out what is older; ISO 8601, UTC")
    add("--model", metavar="TAG", help="only decisions of this version, such as credit_risk_model:v3")
    add("--output", type=Path, metavar="FILE", help="write them as one table: CSV or Parquet, by its suffix")


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the reader, such as `head`, has seen enough
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    # The rest of the buffer has no reader: keep the interpreter from writing it again when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
