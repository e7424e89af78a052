"""The state folder of a stack: free ports that stay the same, one owner, and nothing deleted that is not its own."""

import os
import re
import socket
import stat
from pathlib import Path

import pytest

from services.local.access import write_context
from services.local.state import AlreadyRunning, StackError, StateFolder, check_port, choose_ports, read_json
from sublet.context import load

NAMES = ("nats", "holder", "gateway")


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state")
    folder.path.mkdir()
    return folder


def test_ports_differ_and_stay_the_same(folder: StateFolder) -> None:
    ports = choose_ports(folder, NAMES, gateway_port=0)

    assert 3 == len(set(ports.values()))
    assert ports == choose_ports(folder, NAMES, gateway_port=0)


def test_a_remembered_port_that_is_taken_is_chosen_anew(folder: StateFolder) -> None:
    ports = choose_ports(folder, NAMES, gateway_port=0)
    with socket.create_server(("127.0.0.1", ports["nats"])):
        again = choose_ports(folder, NAMES, gateway_port=0)

    assert again["nats"] != ports["nats"]
    assert again["holder"] == ports["holder"]


def test_a_port_in_use_is_refused_with_its_user_and_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = re.escape(f"port {port} is used by '") + rf".*' \(pid {os.getpid()}\); .*--port 8090"

        with pytest.raises(StackError, match=said):
            check_port(port)


def test_one_stack_at_a_time(folder: StateFolder) -> None:
    with folder.locked(), pytest.raises(AlreadyRunning), folder.locked():
        pytest.fail("two have it")


def test_a_fresh_start_forgets_what_a_stack_kept(folder: StateFolder) -> None:
    folder.make()
    choose_ports(folder, NAMES, gateway_port=0)

    with folder.locked():
        folder.clear()

    assert ["lock"] == [path.name for path in folder.path.iterdir()]
    folder.remove_runtime()


def test_a_fresh_start_touches_nothing_in_a_folder_of_somebody_else(folder: StateFolder) -> None:
    (folder.path / "thesis.tex").write_text("years of work")

    with pytest.raises(StackError, match="does not look like"):
        folder.clear()

    assert (folder.path / "thesis.tex").exists()


def test_the_client_reads_the_context_and_only_its_owner_may(folder: StateFolder) -> None:
    folder.make()
    (folder.keys / "tenant.default.nk").write_text("SUSEED\n")
    api_key = write_context(
        folder, nats_url="nats://127.0.0.1:4222", gateway_port=8080, tenant="default", label="software GPU"
    )

    context = load(environ={}, path=folder.context)

    assert (api_key, "SUSEED", "http://127.0.0.1:8080") == (context.api_key, context.nkey_seed(), context.gateway_url)
    assert 0o600 == stat.S_IMODE(folder.context.stat().st_mode)
    folder.remove_runtime()


def test_the_development_key_is_made_once(folder: StateFolder) -> None:
    keys = {
        write_context(folder, nats_url=f"nats://127.0.0.1:{port}", gateway_port=port, tenant="default", label="")
        for port in (1, 2)
    }

    assert 1 == len(keys)
    assert "nats://127.0.0.1:2" == read_json(folder.context)["nats_url"]


def test_what_a_killed_stack_left_in_shared_memory_is_taken_away(folder: StateFolder, tmp_path: Path) -> None:
    killed, alive = StateFolder(tmp_path / "killed"), StateFolder(tmp_path / "alive")
    for other in (killed, alive):
        other.make()
    folder.make()

    with alive.locked():
        folder.remove_leftovers()

    assert not killed.runtime.exists()
    assert alive.runtime.exists()
    assert folder.runtime.exists()
    for other in (alive, folder):
        other.remove_runtime()
