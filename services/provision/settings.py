"""What an installation in containers is made with; the compose file sets ``SUBLET_PROVISION_<NAME>``."""

from msgspec import Struct


class ProvisionSettings(Struct, frozen=True, kw_only=True):
    """Paths are those inside the container; each is a volume or a folder of the host."""

    node: str = "local"
    """The GPU host's name in every fact."""
    tenant: str = "default"
    """Who deploys; gets a key for NATS and one for the gateway."""
    label: str = "software GPU"
    """Shown beside every figure: ``software GPU`` or ``real GPU``."""
    nats_url: str = "nats://nats:4222"
    """Where the containers reach NATS."""
    replica_count: int = 1
    """Of every stream: 1 for one server, 3 for a cluster of three, which then may lose one."""
    host_nats_port: int = 4222
    """Where programs on the host reach it, on loopback."""
    host_gateway_port: int = 8080
    """The same for the gateway."""
    state_dir: str = "/var/lib/sublet/setup"
    """Every seed and the API key, made once and kept. Nothing else may mount it."""
    secrets_dir: str = "/var/lib/sublet/secrets"
    """A folder for each container with its own secrets; each mounts its own, read-only."""
    nats_config_dir: str = "/etc/nats"
    """For `nats-server.conf`."""
    nats_store_dir: str = "/var/lib/nats"
    """JetStream's, for the bound of its size; the NATS server's user gets it."""
    client_dir: str = "/client"
    """The host's folder for clients: `context.json` and what belongs to it."""
    client_owner_of: str = "/compose"
    """A folder of the host; whoever owns it gets the files in `client_dir`."""
    user_id: int = 10001
    """Of the services that do not run as root, and of the NATS server."""
