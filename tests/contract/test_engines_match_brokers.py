"""Engines restate the memory broker's messages; here both sides are held to the same bytes."""

import inspect

import msgspec
import pytest

from engines import vllm_plugin
from engines.store import connection, messages
from schemas import brokers
from services.nodeagent.adapters.vllm import STORE_BACKEND

# What only the node agent says, only it hears, or what is a part of what it hears.
AGENT_ONLY = {
    "AccountOpen", "AccountClose", "ImageForget", "HostReserve", "Prefetch", "BrokerLook", "BrokerView",
}  # fmt: skip
PARTS = {"AccountView", "GpuPoolView", "HostPoolView"}
RESTATED = sorted(
    name
    for name, kind in vars(messages).items()
    if inspect.isclass(kind)
    and issubclass(kind, msgspec.Struct)
    and kind is not messages.Ask
    and kind.__module__ == messages.__name__
)
VALUES = {
    "str": "a/b-1", "int": 67, "float": 0.25, "bool": True, "dict": {"GPU-1": 5}, "tuple": (1, 2),
}  # fmt: skip


def sample(kind: type[msgspec.Struct], **changed: object) -> msgspec.Struct:
    """A value with every field set to something that is not its default."""
    fields: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        if field.name == "link_class":
            fields[field.name] = brokers.LinkClass.PREFETCH
            continue
        schema = msgspec.json.schema(field.type)
        by_type = {
            "string": "str",
            "integer": "int",
            "number": "float",
            "boolean": "bool",
            "object": "dict",
            "array": "tuple",
        }
        value = VALUES[by_type[schema["type"]]]
        fields[field.name] = ("a", "b") if schema.get("items", {}).get("type") == "string" else value
    return kind(**{**fields, **changed})


def test_engines_restate_all_that_is_said_between_them_and_the_broker() -> None:
    said = {
        name
        for name, kind in vars(brokers).items()
        if inspect.isclass(kind) and issubclass(kind, msgspec.Struct) and kind.__module__ == brokers.__name__
    }

    assert said - AGENT_ONLY - PARTS - {"BrokerMessage"} == set(RESTATED)


@pytest.mark.parametrize("name", RESTATED)
def test_both_sides_write_and_read_the_same_bytes(name: str) -> None:
    ours, theirs = getattr(messages, name), getattr(brokers, name)
    written = msgspec.json.encode(sample(theirs))

    read = msgspec.json.decode(written, type=ours)

    assert written == msgspec.json.encode(read)
    assert msgspec.json.decode(msgspec.json.encode(read), type=theirs) == sample(theirs)


@pytest.mark.parametrize("name", RESTATED)
def test_both_sides_leave_out_the_same(name: str) -> None:
    ours, theirs = getattr(messages, name), getattr(brokers, name)

    def optional(kind: type[msgspec.Struct]) -> dict[str, object]:
        return {
            field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            for field in msgspec.structs.fields(kind)
            if not field.required
        }

    assert optional(theirs) == optional(ours)


def test_a_refusal_is_known_by_its_beginning() -> None:
    assert msgspec.json.encode(brokers.BrokerRefused(refused="no")).startswith(connection.REFUSED)


def test_the_numbers_of_the_wire_are_the_same() -> None:
    from engines import backing

    assert brokers.DESCRIPTORS_MAX == messages.DESCRIPTORS_MAX
    assert brokers.PAGE_BYTES == backing.FIRST_PAGE_BYTES


def test_vllm_is_told_the_name_that_our_plugin_has_there() -> None:
    assert vllm_plugin.BACKEND_NAME == STORE_BACKEND
