"""Settings of the node agent; variables ``SUBLET_NODEAGENT_<NAME>``."""

from msgspec import Struct

from schemas.deployments import ComputeSharing
from schemas.units import GiB, MiB


class NodeAgentSettings(Struct, frozen=True, kw_only=True):
    """One per host."""

    node: str = "node-0"
    """This host's name in every fact; lower-case letters, digits and hyphens."""
    state_dir: str = ".sublet/nodeagent"
    """Journal, machine id and engine logs. Kept over restarts: it is the node's memory of its leases."""
    take_over_from: str = ""
    """Id of the machine whose part of history this host shall continue under the same node name, because that machine
    is gone for good. Without it an agent refuses to go on where another machine wrote."""
    holder_socket: str = ".sublet/holder.sock"
    """Private socket of this host's holder."""
    holder_url: str = "http://127.0.0.1:8090"
    """Where gateways reach the holder for their route leases."""
    engine_host: str = "127.0.0.1"
    """Where this agent and gateways reach the engines. Not loopback: engines listen on every interface of their network
    and answer whoever comes, so give them a network of their own."""
    labels: dict[str, str] = {}
    """What the operator says of this host, for deployments to select by; as JSON: ``{"zone": "a"}``."""
    alive_s: float = 2.0
    """How often the agent says that it is there. Placement gives a node up that is silent for long. 0: never."""
    reserve_bytes: int = 2 * GiB
    """Kept free on each GPU: driver allocations that leases cannot see.

    Not a fraction: it does not grow with the card.
    """
    isolation_probe_s: float = 30.0
    """How long the process that proves a GPU's isolation grade may take; 0: the driver's word is taken for it."""
    is_trusting_engines: bool = True
    """Whether an engine's own budget counts as `cooperative`. Without: what cannot be enforced is only watched."""
    watch_s: float = 0.5
    """How often each replica's bytes are measured and compared with its grant, whatever the grade."""
    overuse_grace_s: float = 2.0
    """An engine that nothing else holds is stopped when it is beyond its grant for so long. On the other grades overuse
    is told, and nobody is stopped."""
    compute_sharing: ComputeSharing = ComputeSharing.TIME_SLICED
    """How engines share a GPU's processors: ``time-sliced``, or ``mps`` through a daemon that the agent starts."""
    mps_control: str = "nvidia-cuda-mps-control"
    """NVIDIA's control program for MPS, with arguments as in a shell."""
    mps_pipe_dir: str = ""
    """Where its daemon listens; seen by engines too. Empty: ``mps`` in `state_dir`."""
    broker_socket: str = ""
    """Private socket of this host's memory broker, the agent's side. Empty: the holder is asked for its broker's."""
    broker_engine_socket: str = ""
    """Its other socket, which engines are told."""
    images_dir: str = ""
    """Folder on a memory file system for the images of frozen processes; they outlive this agent there. Empty: one of
    this node's own under ``/dev/shm``."""
    has_checkpoint: bool = True
    """Whether the driver's checkpoint may be used, where it has one. A process of this agent calls it, which keeps a
    CUDA context on each GPU once a replica is parked that way."""
    is_checkpoint_plain: bool = False
    """Leave the images with the driver, also where it could put them into our memory: slower, and nothing is pinned."""
    lock_timeout_s: float = 5.0
    """How long a process may take to end its running GPU work when it is to be frozen; later it stays as it is."""
    residue_bytes: int = 640 * MiB
    """Expected device bytes of a parked engine (its context) until the first park measures it."""
    host_budget_bytes: int = 0
    """Host memory for parked weights. 0: half of the memory that is available at the start."""
    drain_s: float = 10.0
    """How long a replica may finish its requests before a park is abandoned."""
    stop_grace_s: float = 5.0
    """Between the polite signal to an engine and the kill."""
    start_deadline_s: float = 600.0
    """A cold start that takes longer has failed. NIM and vLLM need up to three minutes for the article's models."""
    wake_deadline_s: float = 30.0
    """A restore that takes longer has failed."""
    step_grace_s: float = 15.0
    """A start, park, wake or stop that has not ended so long after the deadlines of its parts is suspect. It is counted
    by the host's steady clock, so that a clock that is set makes no suspects."""
    look_pause_s: float = 2.0
    """Between two looks at a suspect engine; doubles with each, three times at most."""
    look_count_max: int = 3
    """After so many looks that could not tell, a suspect engine is ended with the next that cannot."""
    start_attempt_count: int = 5
    """After so many failed starts in a row a replica is given up and reported."""
    restart_backoff_s: float = 1.0
    """Before the first restart of a failed engine; doubles each time."""
    cold_start_s: float = 10.0
    """Simulated engines without their own setting take this long to start before weights are loaded."""
    weight_cache_dir: str = ""
    """Folder where engines keep the weights that they download, shared by all of this host. Empty: each its own."""
    secrets_dir: str = ""
    """Folder with this node's secrets: a file each, named like the variable in which an engine gets it (``HF_TOKEN``).
    Deployments ask for them by name; the content never leaves the node."""
    docker_host: str = ""
    """Address of the Docker engine for containers. Empty: $DOCKER_HOST, else unix:///var/run/docker.sock."""
    docker_config: str = "~/.docker/config.json"
    """Where logins for private registries stand, as ``docker login`` writes them."""
    docker_gpu_access: str = "nvidia"
    """How containers get their GPUs: ``nvidia`` (its container toolkit), ``cdi``, or ``none``."""
    docker_network: str = "sublet-engines"
    """Bridge for containers, made when it is not there: they reach the outside, but not each other."""
    docker_shm_bytes: int = 16 * GiB
    """Shared memory of a container, at the most: engines over several GPUs need much."""
    docker_mounts: tuple[str, ...] = ()
    """Folders that every engine's container sees, as JSON: ``["/srv/models:/models:ro"]``."""
    docker_pull_deadline_s: float = 3600.0
    """An image that is not here by then has failed. Images of engines have 10 to 30 GB."""
    log_bytes_max: int = 16 * MiB
    """A container's log that grows beyond is moved to `.log.1`, once more overwritten: two of these per replica."""
    engine_python: str = ""
    """Interpreter for the engines that we ship; empty: the agent's own."""
    burst_tick_s: float = 1.0
    """How often bytes that no lease claims are shared out among those that may have more than their request. 0: never,
    so that every grant is its request."""
    burst_step_bytes: int = 512 * MiB
    """A grant changes by so much at least: each change costs its engine some driver calls."""
    burst_rest_s: float = 5.0
    """Whoever has given bytes back does not grow again sooner."""
    demand_s: float = 2.0
    """How often engines that may have more than their request are asked how full their caches are: they grow when they
    need it. 0: never, so that whoever may have more gets it."""
    burst_idle_s: float = 30.0
    """Whoever has used little of its cache for so long gives back what it does not use."""
    grow_deadline_s: float = 10.0
    """An engine that has not grown by then keeps what it had."""
    freeze_deadline_s: float = 0.5
    """When an owner wants bytes, borrowers are held at what they use within this."""
    give_back_deadline_s: float = 2.0
    """From the wish of an owner until a borrower that was asked has shrunk; later it is parked or stopped."""
    account_every_s: float = 60.0
    """How often is told who lent and borrowed how much. An account that somebody's lease has left is told at once."""
    measure_s: float = 2.0
    """How often each GPU is looked at: memory, processes, temperature, errors. 0: only at the start."""
    unanswered_s: float = 30.0
    """A driver that does not answer about a GPU for so long makes it suspicious. A driver that loads, or a GPU that is
    being reset, takes some seconds."""
    foreign_step_bytes: int = 256 * MiB
    """A smaller change of what strangers use on a GPU is no news: the reserve covers it."""
    foreign_settle_s: float = 10.0
    """Less foreign memory counts when it has stayed so for so long; more counts at once."""
    quarantine_s: float = 60.0
    """A GPU that misbehaved takes no new lease for so long, then it is tried; twice as long after each further time."""
    quarantine_max_s: float = 3600.0
    """The longest quarantine that ends by itself."""
    quarantine_final_count: int = 8
    """After so many quarantines it stays closed until an operator opens it."""
    quarantine_forget_s: float = 86_400.0
    """A GPU that was well for so long begins with the shortest quarantine again."""
    bad_start_count: int = 3
    """Starts of so many different deployments that fail on one GPU, with none that succeeds between, are the GPU's
    fault. One deployment that does not start is its own."""
    bad_start_window_s: float = 3600.0
