"""Connect to a running Dask cluster, and have its workers run this code."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.core.errors import ClusterError, first_line
from pipeline.core.settings import Settings


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Connect to a running cluster, and send it this package.

    Raises
    ------
    ClusterError
        No scheduler answers at that address, or it has no workers.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ClusterError(
            f"no Dask scheduler answers at {address} ({reason}). Start it, or correct cluster."
        ) from None
    with client, tempfile.TemporaryDirectory() as folder:
        if not client.nthreads():
            raise ClusterError(f"the cluster at {address} has no workers. Start one: dask worker {address}")
        client.upload_file(_zipped_package(Path(folder)))
        yield client


@contextmanager
def cluster_failures() -> Iterator[None]:
    """Turn what a cluster raises when it breaks off into one readable error.

    Raises
    ------
    ClusterError
        The scheduler or too many workers went away.
    """
    from distributed import CancelledError, KilledWorker

    try:
        yield
    except (OSError, CancelledError, KilledWorker) as error:
        raise ClusterError(
            f"the connection to the cluster broke ({type(error).__name__}). Look at its log, and run again."
        ) from None


def _zipped_package(folder: Path) -> str:
    """Zip this package, so that the workers run the code of this process."""
    package = Path(__file__).parent
    archive = folder / "pipeline.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for source in sorted(package.rglob("*.py")):
            target.write(source, source.relative_to(package.parent))
    return str(archive)


class ClusterSettings(Settings):
    """A running Dask cluster; its workers need the libraries of this project, not its code."""

    address: str = Field(pattern=r"^(tcp|tls|ws|wss|ucx|inproc)://")
    """Address of the scheduler."""
