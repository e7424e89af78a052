"""What is generated from the message types is current, complete and valid."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from schemas import __main__ as command
from schemas.catalogue import COMMANDS, FACTS, MESSAGES, QUERIES
from schemas.generate import outputs
from schemas.generators.asyncapi import address_of, asyncapi
from schemas.generators.fixtures import fixture
from schemas.generators.message_schema import ANSWER_OF, message_schema
from schemas.generators.models_file import models_schema
from schemas.generators.reference import field_notes
from schemas.messages import fact_filter, order_subject, tag_of
from schemas.nodes import GpuOffer, LeaseGranted
from schemas.orders import WakeOrdered

ROOT = Path(__file__).resolve().parents[3]


def test_generated_files_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main(["--check"])

    assert status == 0, capsys.readouterr().err


def test_check_names_what_is_stale_and_the_command_that_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([], tmp_path) == 0
    assert command.main(["--golden"], tmp_path) == 0
    page = tmp_path / "docs" / "reference" / "events.md"
    page.write_text(page.read_text() + "edited\n")
    capsys.readouterr()

    status = command.main(["--check"], tmp_path)

    assert status == 1
    assert capsys.readouterr().err == "docs/reference/events.md is not current; run `python -m schemas`\n"


def test_check_names_a_message_without_a_fixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([], tmp_path)
    command.main(["--golden"], tmp_path)
    (tmp_path / "tests" / "golden" / "messages" / "history.progressed.v1.json").unlink()
    capsys.readouterr()

    status = command.main(["--check"], tmp_path)

    assert status == 1
    assert "history.progressed.v1.json is missing; run `python -m schemas --golden`" in capsys.readouterr().err


def test_a_fixture_is_never_overwritten(tmp_path: Path) -> None:
    command.main(["--golden"], tmp_path)
    path = tmp_path / "tests" / "golden" / "messages" / "history.progressed.v1.json"
    path.write_text("published once")

    command.main(["--golden"], tmp_path)

    assert path.read_text() == "published once"


def test_equal_types_give_equal_bytes() -> None:
    assert outputs() == outputs()


@pytest.mark.parametrize("tag", MESSAGES)
def test_every_messages_fixture_is_valid_by_the_published_schema(tag: str) -> None:
    document = message_schema()
    schema = {"$ref": f"#/$defs/{document['x-tags'][tag]}", "$defs": document["$defs"]}

    jsonschema.Draft202012Validator(schema).validate(json.loads(fixture(MESSAGES[tag])))


def test_the_models_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(models_schema())


def test_every_query_has_its_view() -> None:
    assert {tag_of(kind) for kind in ANSWER_OF} == set(QUERIES)


def test_asyncapi_has_a_channel_an_operation_and_a_message_for_each() -> None:
    document = asyncapi()

    assert document["asyncapi"] == "3.0.0"
    for kind in MESSAGES.values():
        token = tag_of(kind).replace(".", "_")
        assert document["channels"][token]["address"] == address_of(kind)
        assert document["operations"][token]["channel"] == {"$ref": f"#/channels/{token}"}
        assert kind.__name__ in document["components"]["messages"]


def test_asyncapi_names_the_stream_of_what_is_stored() -> None:
    channels = asyncapi()["channels"]
    streams = {tag: channels[tag.replace(".", "_")].get("x-jetstream", {}).get("stream") for tag in MESSAGES}

    assert {tag for tag, stream in streams.items() if stream == "SUBLET"} == set(FACTS)
    assert {tag for tag, stream in streams.items() if stream == "INBOX"} == set(COMMANDS)


def test_every_reference_inside_asyncapi_leads_somewhere() -> None:
    document = asyncapi()
    dangling = [ref for ref in references(document) if not leads_somewhere(document, ref)]

    assert dangling == []


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for child in node.values() for ref in references(child)]
    return [ref for child in node for ref in references(child)] if isinstance(node, list) else []


def leads_somewhere(document: Any, ref: str) -> bool:
    here = document
    for step in ref.removeprefix("#/").split("/"):
        if step not in here:
            return False
        here = here[step]
    return True


def test_addresses_are_the_subjects_that_services_use() -> None:
    order = WakeOrdered(node="a", writer_epoch=1, deadline_ms=1, replica_id="r", wake_epoch=1)

    assert address_of(WakeOrdered).replace("{node}", "a") == order_subject(order)
    for kind in FACTS.values():
        if kind.writer:
            pattern = address_of(kind).replace("{node}", "*").replace("{shard}", "*")
            assert pattern == fact_filter(kind)


def test_the_page_has_a_section_for_each_message_and_links_that_lead_somewhere() -> None:
    page = outputs()["docs/reference/events.md"]
    sections = {line.removeprefix("### ").lower() for line in page.splitlines() if line.startswith("### ")}
    linked = {word.partition(")")[0] for word in page.split("](#")[1:]}

    assert {kind.__name__.lower() for kind in MESSAGES.values()} <= sections
    assert linked <= sections


def test_notes_below_fields_reach_the_page() -> None:
    note = field_notes(GpuOffer)["foreign_bytes"]

    assert note
    assert note in outputs()["docs/reference/events.md"]
    assert msgspec.structs.fields(LeaseGranted)[0].encode_name in ("node", "proposal_id")
