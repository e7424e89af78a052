"""Numbers on the wire say their unit: in the field's name, or by a type from schemas/units.py."""

import importlib
import pkgutil
import typing
from collections.abc import Iterator

import msgspec
import pytest

# The last word of a numeric field's name.
UNIT_SUFFIXES = (
    "bytes", "s", "ms", "us", "ns", "count", "fraction", "portion", "percent", "ratio",
    "epoch", "seq", "generation", "version", "ticks", "tokens", "celsius", "watts", "mhz",
)  # fmt: skip
# Numbers that have no unit, each with the reason.
UNITLESS = {
    "priority": "a place on the scale of seven names (25 to 150)",
    "score": "compared with other scores of the same decision only",
    "pid": "the kernel's name for a process",
    "port": "the kernel's name for a socket",
    "index": "a position counted from 0",
    "code": "an exit or status code",
    "indices": "positions counted from 0",
    "millicores": "thousandths of a CPU core; may be negative where more was promised than there is",
    "gpus": "a number of GPUs, or parts of them",
    "quota": "GPUs or parts of them, said by the name before it",
    "weight": "compared with the weights of other tenants only",
    "seed": "the start of a random sequence",
}


def structs() -> Iterator[type[msgspec.Struct]]:
    """Every Struct that a module of schemas/ defines."""
    package = pytest.importorskip("schemas", reason="schemas/ does not exist yet")
    names = [f"schemas.{module.name}" for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__"]
    for name in sorted(names):
        module = importlib.import_module(name)
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == name:
                yield kind


def unit_types() -> list[object]:
    """The Annotated numbers of schemas/units.py."""
    units = importlib.import_module("schemas.units")
    return [kind for kind in vars(units).values() if typing.get_origin(kind) is typing.Annotated and is_number(kind)]


def is_number(hint: object) -> bool:
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return inner is int or inner is float


def bare_numbers(hint: object, known: list[object]) -> bool:
    """Whether a number without a unit type occurs anywhere in this annotation: alone, in a union, in a container."""
    if hint in known:
        return False
    if is_number(hint):
        return True
    return any(bare_numbers(part, known) for part in typing.get_args(hint) if not isinstance(part, msgspec.Meta))


def test_every_number_says_its_unit() -> None:
    known = unit_types()
    found = [
        f"{kind.__module__}.{kind.__name__}.{name}"
        for kind in structs()
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if typing.get_origin(hint) is not typing.ClassVar
        if bare_numbers(hint, known)
        if name.split("_")[-1] not in UNIT_SUFFIXES and name.split("_")[-1] not in UNITLESS
    ]

    assert not found, (
        "a number whose unit a reader must guess; end its name with one of "
        f"{', '.join('_' + suffix for suffix in UNIT_SUFFIXES)}, or use a type from schemas/units.py, or, if it has no "
        "unit, add its last word to UNITLESS here with the reason:\n  " + "\n  ".join(found)
    )


@pytest.mark.parametrize(
    ("hint", "is_bare"),
    [(int, True), (int | None, True), (tuple[float, ...], True), (dict[str, int], True), (str, False), (bool, False)],
)
def test_numbers_are_found_inside_containers(hint: object, is_bare: bool) -> None:
    assert bare_numbers(hint, []) == is_bare
