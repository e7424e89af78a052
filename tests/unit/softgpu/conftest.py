import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import softgpu
from tests.unit.softgpu.machines import Machine, MakeMachine


@pytest.fixture
def machine() -> Iterator[MakeMachine]:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    made: list[Machine] = []

    def make(**settings: Any) -> Machine:
        values = {"gpus": 1, "profile": "test-1", "total_bytes": 256 << 20, **settings}
        state_dir = Path("/dev/shm") / f"softgpu-test-{uuid.uuid4().hex[:12]}"
        made.append(Machine(softgpu.Host(state_dir, **values)))
        return made[-1]

    yield make
    findings = [finding for one in made for finding in one.findings()]
    for one in made:
        one.close()
    assert not findings, "the test left a shared state that is not true"
