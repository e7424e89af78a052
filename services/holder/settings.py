"""What an operator may choose for a holder. Environment: ``SUBLET_HOLDER_<FIELD>``."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from schemas.units import MiB


class HolderSettings(Struct, frozen=True, kw_only=True):
    """The defaults suit one host; several holders on one host need different `state_dir` and `port`."""

    state_dir: str = ".sublet/holder"
    """Logs, the lock that keeps a second holder away, and by default the socket. Names this holder's engines: a
    restarted holder kills what a killed one with the same folder left over."""
    socket_path: str = ""
    """Where the node agent controls engines; mode 0600. Empty: `holder.sock` in `state_dir`. At most 107 bytes long."""
    host: str = "127.0.0.1"
    """Where gateways get route leases. Other hosts need a network of their own and `token`."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 7070
    """TCP port for gateways; 0 picks a free one."""
    token: str = ""
    """Bearer token that gateways must show; empty: none, for loopback."""
    term_s: Annotated[float, Meta(gt=0)] = 1.0
    """Of a route lease: how long a park waits at the most for a gateway that is gone."""
    stop_grace_s: Annotated[float, Meta(ge=0)] = 10.0
    """Between SIGTERM and SIGKILL of engines when the holder itself ends; Docker's own grace must be longer."""
    log_bytes_max: Annotated[int, Meta(ge=4096, description="bytes")] = 16 * MiB
    """An engine's log that grows beyond is moved to `.log.1`, once more overwritten: two of these per replica."""
    has_broker: bool = True
    """Whether it keeps the memory broker of this host (`services/broker`), whose settings are ``SUBLET_BROKER_*``."""
    cgroup: str = "auto"
    """Where engines get a cgroup v2 leaf each: below the holder's own (`auto`), a path below the mount, or `off`."""

    @property
    def socket(self) -> Path:
        return Path(self.socket_path) if self.socket_path else Path(self.state_dir) / "holder.sock"
