"""Who may do what on the NATS server: small declarations, turned into the allow lists of its configuration.

Whatever is not listed is denied. One administrator creates streams; services read history and append under their own
prefix; a tenant sees its own commands, answers and queries, and never a fact.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nkeys

from kit.bus import Stream
from kit.nats_lease import LEASE_BUCKET, LEASE_STREAM
from kit.nats_wire import service_inbox, tenant_inbox

ADMINISTRATOR: Final = "admin"
NODE_PREFIX: Final = "node."
TENANT_PREFIX: Final = "tenant."
SEED_SUFFIX: Final = ".nk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """Allow lists, sorted."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    may_answer: bool = False
    """May publish once to the reply subject of each message that it received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One entry of the server's configuration. The public key is no secret."""

    name: str
    public_key: str
    permissions: Permissions


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What one user does, in the bus's words. Every list may be empty."""

    inbox: str
    appends: tuple[str, ...] = ()
    """Prefixes in history, as wildcards; each is this user's alone."""
    reads: tuple[Stream, ...] = ()
    stores: tuple[str, ...] = ()
    """Subjects of `publish_stored`."""
    publishes: tuple[str, ...] = ()
    subscribes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    """Subjects of requests."""
    asks: tuple[str, ...] = ()
    leases: tuple[str, ...] = ()
    snapshots: str = ""
    """Whose snapshots it reads."""


def permissions_of(access: Access) -> Permissions:
    """The allow lists that make exactly this possible."""
    publish = {*access.appends, *access.stores, *access.publishes, *access.asks}
    if access.appends:
        publish.add(f"$JS.API.STREAM.MSG.GET.{Stream.HISTORY}")
    for stream in access.reads:
        publish |= {
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        }
    if access.snapshots:
        subjects = f"sublet.snapshot.{access.snapshots}.>"
        publish |= {
            f"$JS.API.STREAM.INFO.{Stream.SNAPSHOTS}",
            f"$JS.API.CONSUMER.CREATE.{Stream.SNAPSHOTS}.*.{subjects}",
            f"$JS.API.CONSUMER.MSG.NEXT.{Stream.SNAPSHOTS}.*",
        }
    if access.leases:
        publish |= {f"$JS.API.STREAM.MSG.GET.{LEASE_STREAM}", f"$JS.API.STREAM.INFO.{LEASE_STREAM}"}
        publish |= {f"$KV.{LEASE_BUCKET}.{lease}" for lease in access.leases}
    subscribe = {f"{access.inbox}.>", *access.subscribes, *access.answers}
    return Permissions(
        publish=tuple(sorted(publish)), subscribe=tuple(sorted(subscribe)), may_answer=bool(access.answers)
    )


def administrator_access() -> Access:
    """Creates, changes and trims streams, and may read them all; publishes no fact and no order.

    Before it trims history it keeps for gateways what they would have read of it.
    """
    return Access(
        inbox=service_inbox(ADMINISTRATOR),
        publishes=("$JS.API.>",),
        reads=tuple(Stream),
        stores=("sublet.snapshot.gateway.>",),
    )


def service_access(service: str) -> Access:
    """Of a service that is not bound to a node: placement, swapper, autoscaler, gateway."""
    return SERVICES[service]


def node_access(node: str) -> Access:
    """Of one node's agent: its own prefix, orders to it, questions about it."""
    user = f"{NODE_PREFIX}{node}"
    return Access(
        inbox=service_inbox(user),
        appends=(f"sublet.fact.{user}.>",),
        reads=(Stream.HISTORY,),
        stores=("sublet.record.>", "sublet.dead.>", f"sublet.snapshot.{user}.>"),
        publishes=("sublet.signal.>",),
        subscribes=(f"sublet.order.{node}.>", "sublet.signal.>"),
        answers=(f"sublet.query.*.nodeagent.{node}.>",),
        leases=(user,),
        snapshots=user,
    )


def tenant_access(tenant: str) -> Access:
    """Of whoever deploys for this tenant: commands in, answers and queries out. Never a fact."""
    return Access(
        inbox=tenant_inbox(tenant),
        stores=(f"sublet.in.{tenant}.>",),
        asks=(f"sublet.query.{tenant}.>",),
        subscribes=(f"sublet.out.{tenant}.>",),
    )


def access_of(user: str) -> Access:
    """By the user's name: ``admin``, a service, ``node.<node>``, ``tenant.<tenant>``."""
    if user == ADMINISTRATOR:
        return administrator_access()
    if user.startswith(NODE_PREFIX):
        return node_access(user.removeprefix(NODE_PREFIX))
    if user.startswith(TENANT_PREFIX):
        return tenant_access(user.removeprefix(TENANT_PREFIX))
    return service_access(user)


def _writer(service: str, **more: tuple[str, ...] | tuple[Stream, ...]) -> Access:
    return Access(
        inbox=service_inbox(service),
        appends=(f"sublet.fact.{service}.>",),
        stores=("sublet.record.>", f"sublet.dead.{service}", f"sublet.snapshot.{service}.>"),
        answers=(f"sublet.query.*.{service}.>",),
        leases=(service,),
        snapshots=service,
        **more,  # type: ignore[arg-type]
    )


SERVICES: Final = {
    "placement": _writer(
        "placement",
        reads=(Stream.HISTORY, Stream.INBOX),
        publishes=("sublet.order.>", "sublet.out.>", "sublet.signal.>"),
        subscribes=("sublet.signal.>",),
    ),
    "swapper": _writer(
        "swapper",
        reads=(Stream.HISTORY,),
        publishes=("sublet.order.>", "sublet.signal.>"),
        subscribes=("sublet.signal.>",),
    ),
    "autoscaler": _writer(
        "autoscaler",
        reads=(Stream.HISTORY, Stream.RECORD),
        publishes=("sublet.order.>", "sublet.signal.>"),
        subscribes=("sublet.signal.>",),
    ),
    # Many gateways share one user. They write no fact; the live page asks the other services.
    "gateway": Access(
        inbox=service_inbox("gateway"),
        reads=(Stream.HISTORY,),
        stores=("sublet.record.>", "sublet.dead.gateway", "sublet.usage.>"),
        snapshots="gateway",
        publishes=("sublet.signal.>",),
        subscribes=("sublet.signal.>",),
        answers=("sublet.query.*.gateway.>",),
        asks=("sublet.query.>",),
    ),
}


def user_names(*, nodes: Iterable[str] = (), tenants: Iterable[str] = ()) -> list[str]:
    """Every user of an installation with these nodes and tenants."""
    return [
        ADMINISTRATOR,
        *SERVICES,
        *(f"{NODE_PREFIX}{node}" for node in nodes),
        *(f"{TENANT_PREFIX}{tenant}" for tenant in tenants),
    ]


def generate_keys(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """{user: public key}. Seeds are files that only their owner may read; one that exists is kept."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {name: _public_key(directory / f"{name}{SEED_SUFFIX}") for name in names}


def read_seed(directory: Path, name: str) -> str:
    """The secret of one user, for `kit.bus_nats.NatsBus`."""
    return (directory / f"{name}{SEED_SUFFIX}").read_text(encoding="ascii").strip()


def users_of(public_keys: dict[str, str]) -> list[User]:
    """The users for the server's configuration."""
    return [
        User(name=name, public_key=public_key, permissions=permissions_of(access_of(name)))
        for name, public_key in public_keys.items()
    ]


def _public_key(path: Path) -> str:
    if not path.exists():
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(seed + b"\n")
    pair = nkeys.from_seed(bytearray(path.read_bytes().strip()))
    public_key: str = pair.public_key.decode()
    pair.wipe()
    return public_key
