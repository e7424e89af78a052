"""Every service, once: who runs, which settings it has, where it may write. All else reads this list."""

import importlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEntry:
    """One service folder."""

    name: str
    summary: str
    is_single_writer: bool
    """One active instance decides for the whole system; a second stands by."""
    is_per_host: bool = False
    writer: str = ""
    """Its part of history: ``sublet.fact.<writer>.>``; '' when it writes none."""

    @property
    def settings_path(self) -> str:
        return f"services.{self.name}.settings"

    def load_main(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """Its `main`, imported now and not before: a service imports only what it runs."""
        main: Callable[[], Coroutine[Any, Any, None]] = importlib.import_module(f"services.{self.name}.main").main
        return main


SERVICES: Final = (
    ServiceEntry(
        name="holder",
        summary="owns the engine processes of one host, grants route leases",
        is_single_writer=False,
        is_per_host=True,
    ),
    ServiceEntry(
        name="broker",
        summary="lends device memory to engines, keeps images in host memory; the holder starts it",
        is_single_writer=False,
        is_per_host=True,
    ),
    ServiceEntry(
        name="nodeagent",
        summary="grants and enforces leases on one host's GPUs, parks and wakes",
        is_single_writer=False,
        is_per_host=True,
        writer="node.<node>",
    ),
    ServiceEntry(
        name="placement",
        summary="admits deployments, proposes where replicas go",
        is_single_writer=True,
        writer="placement",
    ),
    ServiceEntry(
        name="swapper", summary="decides who is resident and who is parked", is_single_writer=True, writer="swapper"
    ),
    ServiceEntry(name="autoscaler", summary="decides replica counts", is_single_writer=True, writer="autoscaler"),
    ServiceEntry(name="gateway", summary="OpenAI endpoints: routes, holds, meters", is_single_writer=False),
)

BY_NAME: Final = {entry.name: entry for entry in SERVICES}
