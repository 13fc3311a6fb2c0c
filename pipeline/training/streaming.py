"""A Parquet table of any length in; out come a survey, a sample to search on, a booster and the holdout's scores.

The table is read in batches and never held. XGBoost keeps its quantised pages on the disk and reads them back for
each level of each tree, so that the memory needed depends on `page_rows`, not on the table. On a Dask cluster each
worker does so with its own share of the row groups, and the workers agree on every split.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import xgboost as xgb
from tqdm import tqdm

from pipeline.cluster import cluster_failures, connect
from pipeline.core.contract.schema import Schema, Violation, check_columns, load_schema, violations
from pipeline.core.errors import ClusterError, DataError
from pipeline.core.model.features import FrameEncoder, Matrix, make_vectorizer
from pipeline.core.settings import TrainSettings, available_cores
from pipeline.tables.files import Group, ParquetSource, open_source, read_ahead
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import normalised

Pages = Iterator[tuple[Matrix, Matrix]]
"""Encoded rows, shape (m, k), and their labels, shape (m,)."""

TRAIN, TEST, UNLABELLED = 0, 1, 2
"""Sides of a row."""

_BLOCK = 1 << 16
"""Rows read at a time: what is beside the pages stays small."""

_SAMPLE_SEED = 1_000_003
"""Added to the seed, so that the sample is drawn without regard to the split."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a table found.

    Attributes
    ----------
    sides
        `TRAIN`, `TEST` or `UNLABELLED` for each row: shape (n,), uint8.
    sample
        About as many labelled rows as asked for, by a hash of their content, as `pipeline.tables.labelled` gives them.
    digest
        That of `frame_digest` for the whole table.
    notes
        One line for each thing left out.
    """

    sides: npt.NDArray[np.uint8]
    sample: pd.DataFrame
    digest: str
    notes: tuple[str, ...]


class TableDigest:
    """Sha256 over the names and values of a table's columns, row by row in order, fed in parts of any size."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._sha = hashlib.sha256("\n".join(columns).encode())

    def update(self, frame: pd.DataFrame) -> None:
        """Add rows."""
        self._sha.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())

    def text(self) -> str:
        """32 hex digits."""
        return self._sha.hexdigest()[:32]


def frame_digest(frame: pd.DataFrame) -> str:
    """Digest of a table in memory: see `TableDigest`."""
    digest = TableDigest(list(frame.columns))
    digest.update(frame)
    return digest.text()


def is_streamed(settings: TrainSettings) -> bool:
    """Whether the table is too long to search on: Parquet of more than ``search_rows`` rows."""
    path = Path(settings.data)
    if not path.is_dir() and path.suffix != ".parquet":
        return False
    return (open_source(path).count or 0) > settings.search_rows


def survey(settings: TrainSettings, schema: Schema) -> Survey:
    """Validate a whole table, decide each row's side, and draw the sample.

    Raises
    ------
    DataError
        The table cannot be read, or rows break the contract: every broken rule is listed.
    """
    source = ParquetSource(Path(settings.data))
    empty = source.schema.empty_table()
    check_columns(empty, schema, labelled=True)
    columns = list(normalised(empty.to_pandas(), schema).columns)
    rows = source.count or 0
    sides, sample, problems = [], [], _Problems()
    digest = TableDigest(columns)
    with tqdm(total=rows, desc="survey", unit="row", unit_scale=True, disable=None) as bar:
        for batch in read_ahead(source.batches(_BLOCK)):
            table = batch.rows.to_pandas()
            labelled = table[schema.target.name].notna().to_numpy(dtype=bool)
            problems.add(batch.rows.filter(pa.array(labelled)), table[labelled], batch.numbers[labelled], schema)
            if not problems:
                frame = normalised(table[labelled], schema)
                digest.update(frame)
                sides.append(_sides(frame, labelled, schema, settings))
                share = settings.search_rows / rows
                sample.append(frame[is_test_row(frame, schema, settings.seed + _SAMPLE_SEED, share)])
            bar.update(len(table))
    problems.raise_any(settings.data, schema)
    found = np.concatenate(sides)
    return Survey(found, pd.concat(sample, ignore_index=True), digest.text(), _notes(found, source, schema))


def fit(
    settings: TrainSettings, schema: Schema, found: Survey, parameters: Mapping[str, Any], rounds: int
) -> xgb.Booster:
    """Train on every row of the training side.

    Raises
    ------
    ClusterError
        The cluster cannot be reached, or broke off.
    """
    share = share_of(settings, schema, found)
    if settings.cluster is None:
        return share.train({**parameters, "nthread": available_cores()}, rounds, shown=True)
    with connect(settings.cluster.address) as client, cluster_failures():
        return _train_on_cluster(client, share, dict(parameters), rounds)


def held_out(
    settings: TrainSettings, schema: Schema, found: Survey, booster: xgb.Booster
) -> tuple[Matrix, Matrix]:
    """Score every held-out row: labels and probabilities of default, both shape (n,), float32."""
    booster.set_param({"nthread": available_cores()})
    pages = share_of(settings, schema, found).pages(TEST)
    scored = [(labels, booster.inplace_predict(matrix)) for matrix, labels in pages]
    labels, probabilities = (np.concatenate(part) for part in zip(*scored, strict=True))
    return labels, probabilities


@dataclass(frozen=True)
class Share:
    """Row groups of a table that one process trains on; travels to cluster workers, which see the same files."""

    path: str
    groups: tuple[Group, ...]
    sides: npt.NDArray[np.uint8]
    """Sides of the rows of these groups, in order."""
    schema: Mapping[str, Any]
    page_rows: int
    cache: str | None

    def pages(self, side: int) -> Pages:
        """Read and encode the rows of one side, about `page_rows` at a time."""
        matrices: list[Matrix] = []
        labels: list[Matrix] = []
        for matrix, label in read_ahead(self._blocks(side)):
            matrices.append(matrix)
            labels.append(label)
            if sum(map(len, labels)) >= self.page_rows:
                yield np.concatenate(matrices), np.concatenate(labels)
                matrices, labels = [], []
        if matrices:
            yield np.concatenate(matrices), np.concatenate(labels)

    def train(self, parameters: Mapping[str, Any], rounds: int, *, shown: bool) -> xgb.Booster:
        """Train on the rows of the training side; among several processes, each with its own share."""
        with (
            tempfile.TemporaryDirectory(prefix="pages-", dir=self.cache) as folder,
            tqdm(total=rounds, desc="rounds", unit="round", disable=None if shown else True) as bar,
        ):
            return self._train(parameters, rounds, Path(folder), bar)

    def split(self, parts: int) -> list[Share]:
        """Cut into at most so many shares of whole row groups, about equally long."""
        ends = np.cumsum([group.rows for group in self.groups])
        starts = ends - [group.rows for group in self.groups]
        owners = (starts + ends) // 2 * parts // ends[-1]  # a group belongs where its middle lies
        return [
            replace(
                self,
                groups=tuple(self.groups[position] for position in members),
                sides=self.sides[starts[members[0]] : ends[members[-1]]],
            )
            for members in (np.flatnonzero(owners == owner) for owner in np.unique(owners))
        ]

    def _train(self, parameters: Mapping[str, Any], rounds: int, folder: Path, bar: Any) -> xgb.Booster:
        # Gone with this function: XGBoost removes its pages before their folder is removed.
        pages = _Pages(lambda: self.pages(TRAIN), folder)
        data = xgb.ExtMemQuantileDMatrix(pages, max_bin=parameters["max_bin"], nthread=parameters["nthread"])
        return xgb.train(dict(parameters), data, rounds, callbacks=[_Rounds(bar)])

    def _blocks(self, side: int) -> Pages:
        schema = load_schema(self.schema)
        encode = FrameEncoder(schema, make_vectorizer(schema)).transform
        done = 0
        for batch in ParquetSource(Path(self.path)).batches(_BLOCK, self.groups):
            mine = self.sides[done : done + len(batch.rows)] == side
            done += len(batch.rows)
            rows = batch.rows.filter(pa.array(mine))
            yield encode(rows), schema.labels(rows.select([schema.target.name]).to_pandas())


class _Pages(xgb.DataIter):
    """Hands pages to XGBoost, which asks for them several times and keeps its own form of them on the disk."""

    def __init__(self, start: Callable[[], Pages], folder: Path) -> None:
        self._start = start
        self._pages = start()
        super().__init__(cache_prefix=str(folder / "page"), release_data=True)

    def next(self, input_data: Callable[..., Any]) -> bool:
        """Hand over one page; False at the end."""
        page = next(self._pages, None)
        if page is None:
            return False
        input_data(data=page[0], label=page[1])
        return True

    def reset(self) -> None:
        """Begin again."""
        self._pages = self._start()


class _Rounds(xgb.callback.TrainingCallback):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def after_iteration(self, model: xgb.Booster, epoch: int, evals_log: Any) -> bool:
        self._bar.update()
        return False


class _Problems:
    """Broken rules over all batches: how often, and where first."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], list[int]] = {}
        self._labels: set[Any] = set()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(
        self, rows: pa.RecordBatch, table: pd.DataFrame, numbers: npt.NDArray[np.int64], schema: Schema
    ) -> None:
        """Check some rows, whose numbers in the table are given."""
        target = schema.target
        strange = ~table[target.name].isin([target.negative, target.positive]).to_numpy(dtype=bool)
        self._labels |= set(table[target.name].unique())
        found = list(violations(rows, schema))
        if strange.any():
            found.append(Violation(target.name, f"must be {target.negative} or {target.positive}", strange))
        for violation in found:
            key = (violation.column, violation.rule)
            self._counts[key] += int(violation.rows.sum())
            first = self._first.setdefault(key, [])
            first += numbers[violation.rows][: 5 - len(first)].tolist()

    def raise_any(self, source: str, schema: Schema) -> None:
        """Raise `DataError` if a rule is broken, or a label never occurs."""
        lines = [
            f"  {column}: {rule}: {count} {'row' if count == 1 else 'rows'}, "
            f"first at {', '.join(map(str, self._first[column, rule]))}"
            for (column, rule), count in self._counts.items()
        ]
        if not lines and len(self._labels) < 2:
            lines = [f"  {schema.target.name}: both labels must occur, received one or none"]
        if lines:
            rule = "breaks the contract (rows are counted from 1, without the header)"
            raise DataError("\n".join([f"{source}: {rule}", *lines]))


def _sides(
    frame: pd.DataFrame, labelled: npt.NDArray[np.bool_], schema: Schema, settings: TrainSettings
) -> npt.NDArray[np.uint8]:
    sides = np.full(len(labelled), UNLABELLED, dtype=np.uint8)
    sides[labelled] = np.where(is_test_row(frame, schema, settings.seed, settings.test_share), TEST, TRAIN)
    return sides


def _notes(sides: npt.NDArray[np.uint8], source: ParquetSource, schema: Schema) -> tuple[str, ...]:
    notes = [f"streamed {len(sides):,} rows: searched on a sample, fitted and tested on all"]
    if unlabelled := int((sides == UNLABELLED).sum()):
        notes.append(f"dropped {unlabelled} rows without a label in {schema.target.name}")
    unknown = [name for name in source.schema.names if name not in {*schema.fields, schema.target.name}]
    if unknown:
        notes.append(f"ignored columns that the contract does not know: {', '.join(unknown)}")
    return tuple(notes)


def share_of(settings: TrainSettings, schema: Schema, found: Survey) -> Share:
    """The whole table as one share."""
    # Workers may run in another folder.
    path = str(Path(settings.data).resolve())
    return Share(
        path, ParquetSource(Path(path)).groups, found.sides, schema.document(), settings.page_rows, settings.cache
    )


def _train_on_cluster(client: Any, share: Share, parameters: dict[str, Any], rounds: int) -> xgb.Booster:
    from xgboost.tracker import RabitTracker

    workers = client.nthreads()
    shares = share.split(len(workers))
    tracker = RabitTracker(len(shares), host_ip=_address_towards(client.scheduler.address), timeout=60)
    tracker.start()
    # One task a worker, all at once: they wait for each other at every split.
    futures = [
        client.submit(
            _train_on_worker,
            client.scatter(part, workers=[address], hash=False),
            {**parameters, "nthread": threads},
            rounds,
            tracker.worker_args(),
            workers=[address],
            allow_other_workers=False,
            pure=False,
            retries=0,
        )
        for part, (address, threads) in zip(shares, workers.items(), strict=False)
    ]
    try:
        return xgb.Booster(model_file=bytearray(client.gather(futures)[0]))
    except xgb.core.XGBoostError as error:  # one worker is lost, and the others notice it inside XGBoost
        raise ClusterError(
            f"a worker failed while training: {str(error).splitlines()[0]}; look at its log, and run again"
        ) from None
    finally:
        with suppress(xgb.core.XGBoostError):
            tracker.free()


def _train_on_worker(share: Share, parameters: dict[str, Any], rounds: int, arguments: dict[str, Any]) -> bytes:
    from xgboost.dask import CommunicatorContext

    with CommunicatorContext(**arguments):
        return bytes(share.train(parameters, rounds, shown=False).save_raw("ubj"))


def _address_towards(scheduler: str) -> str:
    """Address of this machine on the way to the scheduler: the one at which its workers reach us."""
    host, port = urlsplit(scheduler).hostname, urlsplit(scheduler).port
    family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # a datagram socket only looks up the route
        return str(probe.getsockname()[0])
