"""The service beside what people use instead: the same version, the same client, rounds interleaved.

::

    python -m benchmarks.serving                      every part below but soak, about 10 minutes
    python -m benchmarks.serving --only peers,batch   some parts
    python -m benchmarks.serving --quick              one short round of each, to see that everything runs
    python -m benchmarks.serving --soak 300           5 minutes of full load: memory and failures

State is made in a temporary folder: two versions are trained with one trial each, and promoted. The client
runs on the same machine as the servers and takes its share of the cores, which is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from benchmarks import endurance, figures
from benchmarks.load import request
from benchmarks.peers import EMPTY_LEAN, FASTAPI, MLFLOW, TUTORIAL, peers
from benchmarks.rounds import CONNECTIONS, Figures, Rounds, ask, markdown, single
from benchmarks.scratch import Scratch
from pipeline.core.contract.schema import Schema
from pipeline.core.model.bundle import TOLERANCE
from pipeline.tables.labelled import ingest
from tests.testkit import PROJECT
from tests.testkit.servers import Server, Service, running

OURS = "this service"
AIMS = {TUTORIAL: 10.0, FASTAPI: 5.0, MLFLOW: 15.0, EMPTY_LEAN: 1.5}
"""Peer → how many times its answers a second the service must give."""
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Bench:
    """What every part of the benchmark works with.

    Attributes
    ----------
    scratch
        State with versions 1 and 2, and 2 promoted.
    rounds
        How long and how often to load.
    folder
        Where figures go.
    quick
        See that everything runs; the figures mean nothing.
    """

    scratch: Scratch
    schema: Schema
    rounds: Rounds
    folder: Path
    quick: bool

    def ours(
        self, name: str = OURS, *, target: str = "service:svc", workers: int = 1, follows: bool = False
    ) -> Service:
        """Describe this project's service as `conf/serve.yaml` has it, but for the number of workers.

        It has a copy of the BentoML home, unless it has to follow promotions.
        """
        environment = self.scratch.service_environment(name, workers)
        if not follows:
            environment["BENTOML_HOME"] = self.scratch.copy_home("ours-" + re.sub(r"\W+", "-", name))
        return Service(
            name,
            ("bentoml", "serve", target, "--port", "{port}"),
            json.dumps(self.schema.example()).encode(),
            environment=environment,
        )

    def applications(self, count: int) -> list[dict[str, Any]]:
        """Take the first rows of the shipped data as requests."""
        frame = ingest(PROJECT / "data/credit_risk.csv", self.schema).frame.head(count)
        rows = frame[list(self.schema.fields)].astype(object).where(frame.notna(), None)
        return cast("list[dict[str, Any]]", rows.to_dict("records"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the state, run the chosen parts, print their tables."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="credit-risk-bench-") as folder:
        bench = _prepare(Path(folder), options)
        for name in options.only:
            print(f"\n## {name}\n\n{_PARTS[name](bench)}", flush=True)
        if options.soak:
            print(f"\n## soak\n\n{_soak(bench, options.soak)}", flush=True)


def compare_peers(bench: Bench) -> str:
    """One worker each, 16 keep-alive connections: answers a second, latencies, and the ratios."""
    services = [bench.ours(), *peers(bench.scratch, bench.schema.example(), version=2)]
    with _running(services) as servers:
        _check_agreement(servers)
        measured = bench.rounds.of({server.service.name: (server, single(server)) for server in servers})
    figures.peers(measured, OURS, bench.folder / "serving.png")
    ours = measured[OURS]
    rows = [
        (name, f"{seen.rate:,.0f}", f"{min(seen.rates):,.0f} to {max(seen.rates):,.0f}",
         f"{ours.rate / seen.rate:.2f}", f"{AIMS[name]:g}" if name in AIMS else "", *_latencies(seen),
         f"{seen.p99 / seen.p50:.1f}", seen.failed, f"{seen.client:.0%}")
        for name, seen in measured.items()
    ]  # fmt: skip
    header = ("one worker each", "answers/s", "range", "this service ÷ it", "aim", "p50 ms", "p99 ms", "p99 ÷ p50",
              "failed", "client's core")  # fmt: skip
    return markdown(header, rows)


def compare_batch(bench: Bench) -> str:
    """Rows a second of `/classify_batch` with 1,000 rows a request, beside `/classify`."""
    service = bench.ours()
    with running(service) as server:
        body = request("/classify_batch", json.dumps(bench.applications(BATCH_ROWS)).encode())
        measured = bench.rounds.of({"/classify": (server, single(server)), "/classify_batch": (server, [body])})
    one, batch = measured["/classify"], measured["/classify_batch"]
    table = [
        (name, f"{seen.rate * rows:,.0f}", f"{seen.rate * rows / one.rate:.1f}", *_latencies(seen), seen.failed)
        for name, seen, rows in (("/classify", one, 1), ("/classify_batch, 1,000 rows", batch, BATCH_ROWS))
    ]
    return markdown(("one worker", "rows/s", "ratio (aim 15)", "p50 ms", "p99 ms", "failed"), table)


def compare_workers(bench: Bench) -> str:
    """Two workers beside one; the client shares the machine's cores with them."""
    services = [bench.ours("1 worker"), bench.ours("2 workers", workers=2)]
    return _beside(_measure(services, bench.rounds), "ratio (aim 1.7)")


def compare_front(bench: Bench) -> str:
    """The model as a service of its own behind the HTTP front, beside the model in the HTTP process."""
    services = [bench.ours("service:svc, 1 worker"), bench.ours("service:front, 1 + 1", target="service:front")]
    return _beside(_measure(services, bench.rounds), "ratio")


def time_start(bench: Bench) -> str:
    """Seconds from the start of `bentoml serve` to `/readyz` 200, one worker."""
    seconds = []
    for _ in range(1 if bench.quick else 5):
        with running(bench.ours()) as server:
            seconds.append(server.seconds_to_ready)
    return markdown(
        ("cold start to ready (aim 4 s)", "median s", "longest s"),
        [("one worker", f"{median(seconds):.1f}", f"{max(seconds):.1f}")],
    )


def _soak(bench: Bench, seconds: float) -> str:
    with running(bench.ours()) as server:
        return endurance.soak(server, single(server), seconds, bench.folder / "soak.png")


def _promotions(bench: Bench) -> str:
    with running(bench.ours(workers=2, follows=True)) as server:
        return endurance.promotions(server, single(server), bench.scratch)


_PARTS: dict[str, Callable[[Bench], str]] = {
    "peers": compare_peers,
    "batch": compare_batch,
    "workers": compare_workers,
    "front": compare_front,
    "start": time_start,
    "promotions": _promotions,
}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", type=_parts, metavar="PART,...", help=f"of {', '.join(_PARTS)} (default: all)")
    add("--quick", action="store_true", help="one short round of each, to see that everything runs")
    add("--rounds", type=int, default=5, help="rounds over all servers (default: 5)")
    add("--seconds", type=float, default=5.0, help="load on each server in each round (default: 5)")
    add("--soak", type=float, metavar="SECONDS", help="load one worker for long and watch its memory")
    add("--figures", type=Path, default=Path("figures"), metavar="FOLDER", help="where PNG files go")
    options = parser.parse_args(arguments)
    if options.only is None:
        options.only = [] if options.soak else list(_PARTS)
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _PARTS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_PARTS)}, received {', '.join(unknown)}")
    return names


def _prepare(folder: Path, options: argparse.Namespace) -> Bench:
    scratch = Scratch.create(folder)
    for version in (1, 2):
        scratch.train(seed=version)
        scratch.promote(version)
    options.figures.mkdir(parents=True, exist_ok=True)
    rounds = Rounds(1, 1.0, 0.3) if options.quick else Rounds(options.rounds, options.seconds, 1.0)
    return Bench(scratch, Schema.load(PROJECT / "conf/schema.yaml"), rounds, options.figures, options.quick)


@contextmanager
def _running(services: Sequence[Service]) -> Iterator[list[Server]]:
    """Start all servers, to load them in turn: an idle one costs nothing, a restart between rounds would."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(service)) for service in services]


def _measure(services: Sequence[Service], rounds: Rounds) -> dict[str, Figures]:
    with _running(services) as servers:
        return rounds.of({server.service.name: (server, single(server)) for server in servers})


def _check_agreement(servers: Sequence[Server]) -> None:
    """See that all that decide give the same probability: speed is compared for the same work."""
    given = {server.service.name: _probability(ask(server)) for server in servers}
    decided = {name: probability for name, probability in given.items() if probability is not None}
    if max(decided.values()) - min(decided.values()) > TOLERANCE:
        raise RuntimeError(f"the services must give the same probability, gave {decided}")


def _probability(answer: Any) -> float | None:
    """Read the probability of default from a service's own form of answer; None: it gives none."""
    if "predictions" in answer:
        return float(answer["predictions"][0])
    probability: float | None = answer.get("probability")
    return probability


def _beside(measured: dict[str, Figures], ratio: str) -> str:
    first = next(iter(measured.values()))
    rows = [
        (name, f"{seen.rate:,.0f}", f"{seen.rate / first.rate:.2f}", *_latencies(seen), seen.failed,
         f"{seen.client:.0%}")
        for name, seen in measured.items()
    ]  # fmt: skip
    header = (f"{CONNECTIONS} connections", "answers/s", ratio, "p50 ms", "p99 ms", "failed", "client's core")
    return markdown(header, rows)


def _latencies(seen: Figures) -> tuple[str, str]:
    return f"{seen.p50:.1f}", f"{seen.p99:.1f}"


if __name__ == "__main__":
    main()
