"""The compose file as a user meets it: one command up, a model that answers, one command down and nothing left."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import docker_engine

ROOT = Path(__file__).resolve().parents[3]
PROJECT = "sublet-test"
VERSION = "test"
MODEL = "tiny"
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # A build takes minutes where Docker is, and `make test` need not have it.
    pytest.mark.skipif(
        "docker" not in os.environ.get("SUBLET_TESTS_REQUIRE", "").split(","), reason="`make compose-test` runs these"
    ),
]


@dataclass(frozen=True)
class Stack:
    environment: Mapping[str, str]
    context: Path

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        command = ["docker", "compose", "-p", PROJECT, "-f", str(ROOT / "compose" / "compose.yaml"), *arguments]
        return run(command, self.environment, timeout_s=timeout_s)

    def sublet(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "sublet", "--context", str(self.context), *arguments]
        return run(command, self.environment, timeout_s=120)

    def inspect(self, service: str) -> dict[str, Any]:
        container = self.compose("ps", "-a", "-q", service).strip()
        found: list[dict[str, Any]] = json.loads(run(["docker", "inspect", container], self.environment, timeout_s=30))
        return found[0]

    def chat(self) -> str:
        context = json.loads(self.context.read_text())
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5}
        request = urllib.request.Request(
            f"{context['gateway_url']}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {context['api_key']}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        content: str = answer["choices"][0]["message"]["content"]
        return content


def run(command: list[str], environment: Mapping[str, str], *, timeout_s: float) -> str:
    finished = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert finished.returncode == 0, f"{' '.join(command)}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("context")
    gateway_port, nats_port = free_ports(2)
    own = {name: value for name, value in os.environ.items() if not name.startswith("SUBLET_")}
    environment = own | docker_engine.ensure_base_images() | {
        "SUBLET_VERSION": VERSION,
        "SUBLET_CONTEXT_DIR": str(folder),
        "SUBLET_PORT": str(gateway_port),
        "SUBLET_NATS_PORT": str(nats_port),
        "SUBLET_COLD_START_S": "0.5",
    }  # fmt: skip
    stack = Stack(environment=environment, context=folder / "context.json")
    try:
        try:
            stack.compose("up", "-d", "--wait", "--build", timeout_s=600)
        except AssertionError as error:
            pytest.fail(f"{error}\n{stack.compose('ps', '-a')}\n{stack.compose('logs', '--tail', '15')}", pytrace=False)
        stack.sublet("deploy", MODEL, "--weights", "2GB", "--share", "0.2")
        yield stack
    finally:
        stack.compose("--profile", "cli", "down", "-v", "--remove-orphans")
        run(["docker", "image", "rm", f"sublet:{VERSION}"], environment, timeout_s=30)
    of_project = ("--filter", f"label=com.docker.compose.project={PROJECT}")
    left = [
        run(["docker", kind, "ls", "-q", *flags, *of_project], environment, timeout_s=30)
        for kind, flags in (("container", ["-a"]), ("volume", []), ("network", []))
    ]
    assert ["", "", ""] == left


def test_a_model_answers_through_the_gateway(stack: Stack) -> None:
    assert stack.chat()


def test_the_command_line_works_in_a_container_too(stack: Stack) -> None:
    nodes = json.loads(stack.compose("run", "--rm", "-T", "cli", "nodes", "--json"))

    assert "software GPU" in json.dumps(nodes)


def test_the_driver_enforces_shares(stack: Stack) -> None:
    assert "driver" in stack.sublet("nodes")


def test_an_agent_that_starts_again_adopts_the_engine(stack: Stack) -> None:
    list_engines = ("exec", "-T", "holder", "sh", "-c", "grep -lz '^simulated$' /proc/[0-9]*/cmdline")
    before = stack.compose(*list_engines)

    stack.compose("restart", "nodeagent")
    stack.compose("up", "-d", "--wait")

    assert 1 == len(before.split())
    assert before == stack.compose(*list_engines)
    assert stack.chat()


def test_containers_have_no_more_rights_than_the_guide_says(stack: Stack) -> None:
    services = stack.compose("config", "--services").split()
    found = {}
    for service in services:
        container = stack.inspect(service)
        host, config = container["HostConfig"], container["Config"]
        assert host["ReadonlyRootfs"], service
        assert not host["Privileged"], service
        assert ["ALL"] == host["CapDrop"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
        assert {"127.0.0.1"} >= {
            binding["HostIp"] for bindings in (host["PortBindings"] or {}).values() for binding in bindings
        }, service
        capabilities = sorted(name.removeprefix("CAP_") for name in host["CapAdd"] or [])
        if capabilities or config["User"] not in ("10001:10001", ""):
            found[service] = (config["User"], capabilities)

    assert {
        "setup": ("0:0", ["CHOWN", "DAC_OVERRIDE", "FOWNER"]),
        "nodeagent": ("0:0", ["DAC_OVERRIDE"]),
    } == found


def test_each_container_sees_its_own_secrets_only(stack: Stack) -> None:
    seen = {
        service: stack.compose("exec", "-T", service, "ls", "/run/secrets/sublet").split()
        for service in ("holder", "nodeagent", "placement", "swapper", "autoscaler", "gateway")
    }

    assert {
        "holder": ["config.json"],
        "nodeagent": ["seed.nk"],
        "placement": ["seed.nk"],
        "swapper": ["seed.nk"],
        "autoscaler": ["seed.nk"],
        "gateway": ["config.json", "seed.nk"],
    } == seen


def test_engines_reach_no_service_but_their_own_node_s(stack: Stack) -> None:
    """NATS, placement and the outside have no name and no route where engines run."""
    probe = "import socket,sys; s=socket.socket(); s.settimeout(2); sys.exit(s.connect_ex((sys.argv[1], 4222)) == 0)"
    address = next(iter(stack.inspect("nats")["NetworkSettings"]["Networks"].values()))["IPAddress"]

    stack.compose("exec", "-T", "holder", "python", "-c", probe, address)


def test_nats_wants_a_key(stack: Stack) -> None:
    url = json.loads(stack.context.read_text())["nats_url"]
    without = {**stack.environment, "SUBLET_NATS_URL": url, "SUBLET_CONTEXT": "", "HOME": str(stack.context.parent)}
    finished = subprocess.run(
        [sys.executable, "-m", "sublet", "ps"],
        env={**without, "PYTHONPATH": str(ROOT)},
        cwd=stack.context.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert 0 != finished.returncode


def test_what_the_host_gets_is_private(stack: Stack) -> None:
    folder = stack.context.parent
    modes = {path.name: path.stat().st_mode & 0o077 for path in (folder / "docker").iterdir()}

    assert {"curl": 0, "tenant.default.nk": 0} == modes
    assert 0 == stack.context.stat().st_mode & 0o077
