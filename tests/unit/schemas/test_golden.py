"""What was published once is readable for ever: old facts stay in history."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas import catalogue, upcasting
from schemas.catalogue import MESSAGES, UnknownVersion, UnreadableMessage
from schemas.history import Progressed
from schemas.messages import tag_of

FOLDER = Path(__file__).resolve().parents[2] / "golden" / "messages"
FIXTURES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_version_ever_published_still_decodes(path: Path) -> None:
    message = catalogue.decode(path.read_bytes())

    assert tag_of(message).rpartition(".v")[0] == path.stem.rpartition(".v")[0]


@pytest.mark.parametrize("tag", MESSAGES)
def test_every_message_has_a_fixture(tag: str) -> None:
    assert (FOLDER / f"{tag}.json").exists(), "run `python -m schemas --golden`"


@pytest.mark.parametrize("tag", MESSAGES)
def test_no_field_was_renamed_or_dropped_within_a_version(tag: str) -> None:
    """Everything in a fixture of a current version comes out again; only fields with a default may be added."""
    body = (FOLDER / f"{tag}.json").read_bytes()

    again = json.loads(catalogue.encode(catalogue.decode(body)))

    lost = missing_from(again, json.loads(body))
    assert not lost, (
        f"renamed or dropped in {tag}: {', '.join(lost)}; old facts stay in history: raise its version and register an "
        "upcaster (schemas/upcasting.py), or, if this version was never published, delete its fixture and run "
        "`python -m schemas --golden`"
    )


def missing_from(new: Any, old: Any, path: str = "") -> list[str]:
    """Paths whose old value is not in the new one."""
    if isinstance(old, dict) and isinstance(new, dict):
        absent = [f"{path}.{key}" for key in old if key not in new]
        return absent + [
            lost for key in old if key in new for lost in missing_from(new[key], old[key], f"{path}.{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [lost for a, b in zip(new, old, strict=True) for lost in missing_from(a, b, f"{path}[]")]
    return [] if new == old else [path]


@pytest.fixture
def old_progressed() -> Iterator[None]:
    """A version 0 of a fact, which gave its time in milliseconds."""

    def to_seconds(body: dict[str, Any]) -> dict[str, Any]:
        return {"at_s": body["at_ms"] / 1000}

    upcasting.register("history.progressed.v0", "history.progressed.v1", to_seconds)
    yield
    upcasting._UPCASTERS.pop("history.progressed.v0")


@pytest.mark.usefixtures("old_progressed")
def test_an_old_version_is_read_as_the_newest() -> None:
    body = msgspec.json.encode({"type": "history.progressed.v0", "at_ms": 1500})

    assert catalogue.decode(body) == Progressed(at_s=1.5)


def test_a_version_that_nobody_knows_stops_the_reader() -> None:
    with pytest.raises(UnknownVersion, match="upgrade this service first"):
        catalogue.decode(b'{"type": "history.progressed.v99"}')


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"type": "nobody.knows.v1"}', b'{"type": "history.progressed.v1"}']
)
def test_what_is_no_message_of_ours_is_told_with_its_reason(body: bytes) -> None:
    with pytest.raises(UnreadableMessage) as caught:
        catalogue.decode(body)

    assert caught.value.reason
