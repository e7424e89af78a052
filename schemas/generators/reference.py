"""``docs/reference/events.md``: a table of all messages, and a section with the fields of each."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec

from schemas import queries
from schemas.catalogue import COMMANDS, FACTS, MESSAGES, ORDERS, QUERIES, SIGNALS
from schemas.generators.asyncapi import address_of, stream_of, summary_of, writer_of
from schemas.generators.message_schema import ANSWER_OF, components
from schemas.messages import Message, tag_of

HEAD: Final = """# Messages

Everything that travels on NATS. Generated from `schemas/` by `python -m schemas`; do not edit.

Bodies are JSON objects. A message says what it is in `type`; readers ignore fields that they do not know.
Facts are kept in the stream `SUBLET`, commands in the stream `INBOX`; all else is fleeting. The same as JSON Schema:
`schemas/generated/messages.schema.json`; as AsyncAPI: `schemas/generated/asyncapi.json`.
"""
GROUPS: Final = (
    (
        "Commands",
        COMMANDS,
        "Wishes of outsiders, stored in the inbox and answered on `sublet.out.<tenant>.<command_id>`.",
    ),
    ("Queries", QUERIES, "Questions by request and reply, answered from acknowledged state."),
    ("Facts", FACTS, "Durable history: each writer appends under its own prefix."),
    ("Orders", ORDERS, "Fleeting instructions to a node agent, with a deadline."),
    ("Signals", SIGNALS, "Fleeting observations of gateways."),
)


def events_page() -> str:
    """The page, with one table and one section for each message, then the parts that they share."""
    grouped = {tag for _, group, _ in GROUPS for tag in group}
    answers = {tag: kind for tag, kind in MESSAGES.items() if tag not in grouped}
    lines = [HEAD, "| Message | Tag | Written by | |", "|---|---|---|---|"]
    groups: list[tuple[str, Mapping[str, type[Message]], str]] = [
        *GROUPS,
        ("Answers", answers, "What became of a command."),
    ]
    for _, group, _ in groups:
        for tag, kind in group.items():
            lines.append(f"| {_link(kind.__name__)} | `{tag}` | {writer_of(kind)} | {_cell(summary_of(kind))} |")
    for title, group, words in groups:
        lines += ["", f"## {title}", "", words]
        for kind in group.values():
            lines += _message_section(kind)
    lines += ["", "## Parts", "", "Objects inside messages, and the views that answer queries."]
    for name, kind in _parts().items():
        lines += ["", f"### {name}", "", *_docs(kind), *_fields_table(kind)]
    return "\n".join(lines).rstrip() + "\n"


def _message_section(kind: type[Message]) -> list[str]:
    lines = ["", f"### {kind.__name__}", "", *_docs(kind)]
    stream = stream_of(kind)
    kept = f"stream `{stream}`" if stream else "kept by nobody"
    lines.append(f"`{tag_of(kind)}` on `{address_of(kind)}`, written by {writer_of(kind)}, {kept}.")
    if kind in QUERIES.values():
        lines[-1] += f" Answered with {_link(ANSWER_OF[QUERIES[tag_of(kind)]].__name__)} or {_link('QueryRefused')}."
    return [*lines, "", *_fields_table(kind)]


def _docs(kind: type[Any]) -> list[str]:
    text = inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
    return [text, ""] if text else []


def _fields_table(kind: type[msgspec.Struct]) -> list[str]:
    notes = field_notes(kind)
    fields = msgspec.structs.fields(kind)
    if not fields:
        return ["No fields."]
    schema = components("{name}")[1][kind.__name__]
    lines = ["| Field | Type | Default | |", "|---|---|---|---|"]
    for field in fields:
        properties = schema["properties"][field.encode_name]
        default = "required" if field.required else f"`{_default(properties)}`"
        note = notes.get(field.name) or properties.get("description", "")
        lines.append(f"| `{field.encode_name}` | {_type(properties)} | {default} | {_cell(note)} |")
    return lines


def _default(properties: dict[str, Any]) -> str:
    value = properties.get("default", "")
    return msgspec.json.encode(value).decode()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _type(schema: dict[str, Any]) -> str:
    """A JSON Schema in a few words: `integer`, `list of [Lease](#lease)`, `string or null`."""
    if "$ref" in schema:
        target = components("{name}")[1][schema["$ref"]]
        return _type(target) if "enum" in target else _link(schema["$ref"])
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            return f"list of {_type(schema.get('items', {}))}"
        case "object" if "additionalProperties" in schema:
            return f"map to {_type(schema['additionalProperties'])}"
        case str(name):
            return name
        case _:
            return "anything"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


@cache
def _parts() -> dict[str, Any]:
    """Every type that is used in a message or a view, but is no message itself, by name."""
    names = set(components("{name}")[1]) - {kind.__name__ for kind in MESSAGES.values()}
    found: dict[str, Any] = {}
    for kind in [*MESSAGES.values(), *ANSWER_OF.values(), queries.QueryRefused]:
        _collect(msgspec.inspect.type_info(kind), found)
    structs = {name: kind for name, kind in found.items() if name in names and issubclass(kind, msgspec.Struct)}
    return dict(sorted(structs.items()))


def _collect(info: Any, found: dict[str, Any]) -> None:
    """Note every Struct and enumeration below a type."""
    if isinstance(info, msgspec.inspect.StructType):
        if info.cls.__name__ in found:
            return
        found[info.cls.__name__] = info.cls
        for field in info.fields:
            _collect(field.type, found)
    elif isinstance(info, msgspec.inspect.EnumType):
        found[info.cls.__name__] = info.cls
    elif isinstance(info, msgspec.inspect.UnionType):
        for option in info.types:
            _collect(option, found)
    else:
        for part in ("item_type", "value_type", "type"):
            if (inner := getattr(info, part, None)) is not None:
                _collect(inner, found)


def field_notes(kind: type[Any]) -> dict[str, str]:
    """The strings that stand below fields, of the class and its bases: {field: text}."""
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("schemas."):
            notes |= _own_notes(base)
    return notes


@cache
def _own_notes(kind: type[Any]) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef), kind
    notes = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                notes[name] = inspect.cleandoc(text)
    return notes
