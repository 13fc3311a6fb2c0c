"""Command line: ``python -m pipeline COMMAND`` parses flags, runs one step of the journey, and reports."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.report import Report

DEFAULT = "default"
"""MLproject cannot leave a parameter out: this word stands for "what the configuration says"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns
    -------
    int
        0 done; 1 refused or failed, with one readable message on stderr. Bad usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    module, function = options.step
    try:
        # Each step is imported when it runs: mlflow and optuna cost seconds that `status` must not pay.
        report: Report = getattr(import_module(module), function)(options)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Credit risk from tuning to served decisions."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _train(
        _command(
            commands, "train", "pipeline.training.command:run", "tune, train, evaluate and register a candidate"
        )
    )
    _promote(
        _command(
            commands, "promote", "pipeline.promotion.commands:promote", "judge a candidate and make it answer"
        )
    )
    _rollback(
        _command(
            commands, "rollback", "pipeline.promotion.commands:rollback", "go back to an earlier promoted version"
        )
    )
    _command(commands, "status", "pipeline.promotion.commands:status", "show what is promoted, and the history")
    _sync(
        _command(
            commands, "sync", "pipeline.promotion.commands:sync", "make this machine follow MLflow's champion"
        )
    )
    _score(_command(commands, "score", "pipeline.scoring.score:run", "decide on every row of a table"))
    _package(
        _command(
            commands, "package", "pipeline.packaging.bento:run", "build a Bento that serves the promoted version"
        )
    )
    _decisions(
        _command(commands, "decisions", "pipeline.monitoring.log_reader:run", "read the service's decision log")
    )
    return parser


def _command(commands: Any, name: str, step: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    parser.set_defaults(step=tuple(step.split(":")))
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


def _train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=_optional(str), metavar="PATH", help="CSV, Parquet or folder of Parquet (conf: data)")
    add("--schema", type=_optional(str), metavar="PATH", help="the data contract (conf: contract)")
    add("--config", default="conf/train.yaml", metavar="PATH", help="file of the defaults")
    add("--trials", type=_optional(_positive), metavar="N", help="trials of the study in all (conf: trials)")
    add("--workers", type=_optional(_positive), metavar="N", help="parallel evaluations (conf: workers)")
    add("--study", type=_optional(str), metavar="NAME", help="study to start or resume (conf: study.name)")
    add("--seed", type=_optional(int), metavar="N", help="seed of everything random (conf: seed)")


def _promote(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=_optional(_positive), metavar="N", help="version of the registered model")
    which.add_argument(
        "--run-id", type=_optional(str), metavar="ID", help="the version that this MLflow run registered"
    )
    which.add_argument("--best", action="store_true", help="the version with the best test log loss")
    add = parser.add_argument
    add("--config", default="conf/promote.yaml", metavar="PATH", help="file of the gates")
    add("--data", type=_optional(str), metavar="PATH", help="labelled table that judges (conf: data)")
    add("--dry-run", action="store_true", help="judge and change nothing")
    add("--force", action="store_true", help="promote although the gate refuses; needs --reason")
    add("--reason", metavar="TEXT", help="why; kept in the history")
    add("--allow-schema-change", action="store_true", help="accept a contract unlike the champion's")


def _rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=_optional(_positive), metavar="N", help="version; default: the previous one")
    parser.add_argument("--reason", metavar="TEXT", help="why; kept in the history")
    parser.add_argument("--config", default="conf/promote.yaml", metavar="PATH", help="file of the defaults")


def _sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="conf/promote.yaml", metavar="PATH", help="file of the defaults")
    parser.add_argument("--watch", type=_seconds, metavar="SECONDS", help="keep following, looking this often")


def _score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="CSV, Parquet or folder of Parquet")
    add("--output", required=True, metavar="FILE", help="CSV or Parquet, by the name's ending")
    add("--model", default="promoted", help="promoted, models:/… or runs:/…")
    add("--config", default="conf/score.yaml", metavar="PATH", help="file of the defaults")
    add("--threads", type=_optional(_positive), metavar="N", help="batches scored at once (conf: threads)")
    add("--rejects", metavar="FILE", help="CSV of the rows that break the contract; default: OUTPUT.rejects.csv")


def _package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unpinned", action="store_true", help="no version inside: it serves a mounted store only"
    )


def _decisions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", metavar="DIR", help="the decision log (default: decision_log.folder of conf/serve.yaml)")
    add("--since", type=datetime.fromisoformat, metavar="TIME", help="leave out what is older; ISO 8601, UTC")
    add("--model", metavar="TAG", help="only decisions of this version, such as credit_risk_model:v3")
    add("--output", metavar="FILE", help="write them as one table; CSV or Parquet, by the name's ending")


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the reader, such as `head`, has seen enough
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    # What is left in the buffer has nowhere to go: let the interpreter not try again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
