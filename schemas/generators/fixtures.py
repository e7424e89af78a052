"""The first fixture of a message: every field set, to a value that its type allows and a reader recognises."""

from typing import Any, Final

import msgspec

from schemas.messages import Message

NUMBERS: Final = {
    "bytes": 15_569_256_448,
    "s": 1.5,
    "ms": 1500,
    "seq": 48_102,
    "count": 2,
    "epoch": 3,
    "fraction": 0.25,
    "portion": 0.3,
}
"""By the last word of a field's name, which is its unit."""
ALTERNATIVES: Final = frozenset({"request_bytes", "limit_bytes"})
"""Optional fields that stay null, because the other way to say the same is set: a share is a portion or bytes."""
TEXTS: Final = {
    "model": "mistral-7b",
    "name": "mistral-7b",
    "node": "a",
    "tenant": "default",
    "gpu_uuid": "GPU-00000000-0000-0000-0000-000000000001",
    "endpoint": "http://127.0.0.1:40001",
    "key_hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "label": "software GPU",
    "priority": "very-high",
    "holder_url": "http://127.0.0.1:40000",
}


def fixture(kind: type[Message]) -> bytes:
    """A valid body of this message, as it travels."""
    made = _value(msgspec.inspect.type_info(kind), "")
    body = msgspec.json.encode(made)
    msgspec.json.decode(body, type=kind)
    return msgspec.json.format(body, indent=2) + b"\n"


def _value(info: Any, name: str) -> Any:
    """A value for a type; `name` is the field that it is for."""
    match info:
        case msgspec.inspect.StructType():
            fields = {field.encode_name: _value(field.type, field.name) for field in info.fields}
            return {info.tag_field: info.tag, **fields} if info.tag_field else fields
        case msgspec.inspect.UnionType() if name in ALTERNATIVES:
            return None
        case msgspec.inspect.UnionType():
            return _value(next(part for part in info.types if not isinstance(part, msgspec.inspect.NoneType)), name)
        case msgspec.inspect.Metadata():
            return _value(info.type, name)
        case msgspec.inspect.EnumType():
            return next(iter(info.cls)).value
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            return [_value(info.item_type, name)]
        case msgspec.inspect.DictType():
            return {"option": _value(info.value_type, "")}
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return _number(info, name)
        case msgspec.inspect.StrType():
            return _text(name)
        case _:
            return None


def _number(info: Any, name: str) -> int | float:
    unit = "at" if name.endswith("at_s") else name.rpartition("_")[2]
    value = 1_795_600_000.5 if unit == "at" else NUMBERS.get(unit, 1)
    if info.le is not None:
        value = min(value, info.le)
    return int(value) if isinstance(info, msgspec.inspect.IntType) else float(value)


def _text(name: str) -> str:
    if name in TEXTS:
        return TEXTS[name]
    if name.endswith(("_id", "_ids")):
        return f"{name.removesuffix('s').removesuffix('_id')}-1"
    return name.replace("_", "-") or "text"
