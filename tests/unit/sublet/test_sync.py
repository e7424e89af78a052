"""The synchronous client is the asynchronous one, waited for."""

import inspect

import pytest

from sublet.client import Client
from sublet.sync import SyncClient


def functions_of(kind: type) -> dict[str, inspect.Signature]:
    """Public functions by name."""
    return {
        name: inspect.signature(member)
        for name, member in vars(kind).items()
        if inspect.isfunction(member) and name[0] != "_"
    }


@pytest.mark.parametrize("name", functions_of(Client))
def test_every_function_is_there_with_the_same_signature(name: str) -> None:
    assert functions_of(SyncClient)[name] == functions_of(Client)[name]
