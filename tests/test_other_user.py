"""A service that runs as another user than the one who promotes reads what is promoted, or says what it lacks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testkit.other_user import NOBODY, answer_as
from tests.testkit.registry import Machine

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")


@pytest.fixture
def shared(promoted_machine: Machine) -> Iterator[Machine]:
    """The promoted machine in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield promoted_machine.copy(folder)
    shutil.rmtree(folder)


def test_a_service_of_another_user_answers_with_what_was_promoted(
    shared: Machine, rows: list[dict[str, object]]
) -> None:
    assert shared.run("promote", "--version", "2").code == 0
    assert answer_as(NOBODY, shared, rows[0]).model == "credit_risk_model:v2"
    modes = {path.stat().st_mode & 0o777 for path in shared.folder(2).rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert shared.folder(2).stat().st_mode & 0o777 == 0o755
    # A read-only mount looks like this to the service.
    for path in [shared.models, *shared.models.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    assert answer_as(NOBODY, shared, rows[0]).model == "credit_risk_model:v2"


def test_going_back_to_a_version_of_private_folders_opens_them(
    shared: Machine, rows: list[dict[str, object]]
) -> None:
    assert shared.run("promote", "--version", "2").code == 0
    shared.folder(1).chmod(0o700)  # as release 0.1 left it
    assert shared.run("rollback").code == 0
    assert answer_as(NOBODY, shared, rows[0]).model == "credit_risk_model:v1"
