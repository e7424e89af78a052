"""Sublet's client: `connect`, `connect_sync`, and `deployment` to describe what to deploy.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sublet._contract import CommandAnswered, DeploymentSpec, DeploymentView
    from sublet.client import Applied, Client, NewKey, connect
    from sublet.context import Context
    from sublet.errors import SubletError
    from sublet.models_file import deployment, read_files
    from sublet.sync import SyncClient, connect_sync

_HOME: Final = {
    "Applied": "sublet.client",
    "Client": "sublet.client",
    "CommandAnswered": "sublet._contract",
    "Context": "sublet.context",
    "DeploymentSpec": "sublet._contract",
    "DeploymentView": "sublet._contract",
    "NewKey": "sublet.client",
    "SubletError": "sublet.errors",
    "SyncClient": "sublet.sync",
    "connect": "sublet.client",
    "connect_sync": "sublet.sync",
    "deployment": "sublet.models_file",
    "read_files": "sublet.models_file",
}

__all__ = [
    "Applied",
    "Client",
    "CommandAnswered",
    "Context",
    "DeploymentSpec",
    "DeploymentView",
    "NewKey",
    "SubletError",
    "SyncClient",
    "connect",
    "connect_sync",
    "deployment",
    "read_files",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sublet' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
