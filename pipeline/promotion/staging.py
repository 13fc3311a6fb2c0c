"""Stage a logged model as a BentoML model: write, open and query it before it may enter the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import StoreError, first_line
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import BOOSTER_FILE, GOLDEN, SCHEMA, VECTORIZER, Bundle, open_bundle
from pipeline.core.promoted import version_home
from pipeline.promotion.failpoint import failpoint
from pipeline.registry.logged_model import OpenedModel


@dataclass(frozen=True)
class Stored:
    """A model as the service would open it.

    Attributes
    ----------
    tag
        Its tag in the BentoML store.
    folder
        Where it lies: on the workbench, or in the store already.
    digests
        Sha256 of each of its files.
    bundle
        The opened model.
    """

    tag: str
    folder: Path
    digests: Mapping[str, str]
    bundle: Bundle

    @property
    def megabytes(self) -> float:
        """Size of all its files, in 10^6 bytes."""
        return sum((self.folder / name).stat().st_size for name in self.digests) / 1e6


def stage(model: OpenedModel, tag: str, bench: Path, metadata: Mapping[str, str]) -> Stored:
    """Save a logged model as a BentoML model on the workbench, and open it there as the service will.

    Parameters
    ----------
    model
        Its golden answers are those that were recorded when it was logged.
    tag
        Its tag in the store, such as ``credit_risk_model:v3``.
    bench
        Folder of `pipeline.promotion.store_folders.workbench`.
    metadata
        Facts kept in the BentoML model.

    Raises
    ------
    StoreError
        The BentoML model cannot be written whole, or not be opened.
    """
    folder = _save(model, tag, bench, metadata)
    failpoint("after-stage")
    # A full disk can cut the booster's file without a word, and a cut file can crash the process that loads it.
    if (folder / BOOSTER_FILE).read_bytes() != bytes(model.parts.booster.save_raw("ubj")):
        raise StoreError(f"{folder}: the booster was not written whole; free space and promote again")
    digests = file_digests(folder)
    return Stored(tag, folder, digests, open_bundle(folder, digests))


def reopen(tag: str, digests: Mapping[str, str]) -> Stored | None:
    """Open a version that is in the store already; None if it is absent or altered."""
    try:
        folder = version_home(tag)
        return Stored(tag, folder, digests, open_bundle(folder, digests))
    except StoreError:
        return None


def _save(model: OpenedModel, tag: str, bench: Path, metadata: Mapping[str, str]) -> Path:
    import bentoml
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    store = bench / "models"
    store.mkdir()
    # `Store.register` copies straight into the final folder and rewrites `latest` in place: not in the real store.
    BentoMLContainer.model_store.set(ModelStore(store))
    try:
        bentoml.xgboost.save_model(
            tag,
            model.parts.booster,
            custom_objects={
                VECTORIZER: model.parts.vectorizer,
                SCHEMA: model.parts.schema.document(),
                GOLDEN: dict(model.golden),
            },
            metadata=dict(metadata),
        )
    except OSError:
        raise
    except Exception as error:  # XGBoost's and BentoML's own errors share no base
        reason = first_line(error)
        raise StoreError(
            f"{tag}: cannot be saved as a BentoML model ({reason}); check disk space and permissions"
        ) from error
    finally:
        BentoMLContainer.model_store.reset()
    name, _, version = tag.partition(":")
    return store / name / version
