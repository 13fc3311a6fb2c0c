"""The package command: build a Bento from the service, its locked requirements and the promoted version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import StoreError
from pipeline.core.promoted import Promotion, read_pointer, version_home
from pipeline.packaging.request import PackageRequest
from pipeline.report import Report

PINNED = "pinned"
"""Folder in the Bento that is a BentoML home of its own, with the pinned version promoted in it."""

_SOURCES = ("service", "pipeline", "conf", "requirements.serve.lock")
_BUILD_FILE = "service/bentofile.yaml"


def run(request: PackageRequest) -> Report:
    """Build a Bento that serves without mlflow, optuna and the training side.

    Raises
    ------
    StoreError
        Nothing is promoted, the promoted version fails a check, or BentoML cannot build.
    """
    promotion = None if request.unpinned else _checked_promotion()
    with _build_context(Path.cwd(), promotion) as context:
        built = _build(context, promotion)
    return Report(_summary(built, promotion), {**built, "pinned": promotion.tag if promotion else None})


def _checked_promotion() -> Promotion:
    promotion = read_pointer()
    if promotion is None:
        raise StoreError(
            "a Bento pins the promoted version, and none is promoted; run `promote`, or give --unpinned"
        )
    from pipeline.core.model.bundle import open_bundle

    # A version counts only after it was loaded and has answered, here as at promotion.
    open_bundle(version_home(promotion.tag), promotion.digests).check_golden()
    return promotion


@contextmanager
def _build_context(project: Path, promotion: Promotion | None) -> Iterator[Path]:
    """Lay out what BentoML builds from: the project's sources and, beside them, a store with one version."""
    with tempfile.TemporaryDirectory(prefix="credit-risk-bento-") as folder:
        context = Path(folder)
        for name in _SOURCES:
            _copy(project / name, context / name)
        _copy(project / _BUILD_FILE, context / "bentofile.yaml")
        if promotion:
            _pin(promotion, context / PINNED)
        yield context


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise StoreError(f"{source}: needed for the Bento and absent; run the command in the project's folder")
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def _pin(promotion: Promotion, home: Path) -> None:
    name, _, version = promotion.tag.partition(":")
    models = home / "models" / name
    shutil.copytree(version_home(promotion.tag), models / version)
    (models / "latest").write_text(version)
    pinned = promotion.model_copy(update={"previous": None, "why": f"pinned at build: {promotion.why}"})
    (models / "promoted.json").write_text(pinned.model_dump_json(indent=2) + "\n")
    (models / "history.jsonl").write_text(pinned.model_dump_json() + "\n")


def _build(context: Path, promotion: Promotion | None) -> dict[str, Any]:
    """Let BentoML build, in a process of its own: it imports the service, which this side must not know."""
    labels = {"model": promotion.tag, "mlflow_run_id": promotion.run_id} if promotion else {}
    flags = [flag for name, value in labels.items() for flag in ("--label", f"{name}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", *flags, "--output", "tag"],
        cwd=context,  # BentoML reads no build file outside the folder that it is started in
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise StoreError(f"bentoml build failed: {''.join(last)}")
    tag = done.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    return {"tag": tag, "path": _bento_path(tag)}


def _bento_path(tag: str) -> str:
    import bentoml

    return str(bentoml.bentos.get(tag).path)


def _summary(built: dict[str, Any], promotion: Promotion | None) -> str:
    tag, path = built["tag"], built["path"]
    lines = [
        f"Built {tag}",
        f"  in      {path}",
        f"  pinned  {promotion.tag if promotion else 'nothing'}",
        "Next:",
    ]
    if promotion:
        lines.append(f"  BENTOML_HOME={path}/src/{PINNED} bentoml serve {path}   answers with the pinned version")
    lines.append(f"  bentoml serve {tag}   answers with the version promoted on this machine")
    lines.append(f"  python -m pipeline image --bento {tag}   builds its container image")
    return "\n".join(lines)
