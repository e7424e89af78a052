"""With an MPS server behind all clients: who is evicted, who never is, and the limit of one client."""

import pytest

from tests.unit.softgpu.machines import Child, Machine, MakeMachine

pytestmark = pytest.mark.processes

MiB = 1 << 20
ASK = """context()
for line in sys.stdin:
    answer = cu.cuMemAlloc(int(line) * MiB); say([error(answer), *(free_and_total() if answer[0] == 0 else ())])"""


def two_groups(machine: MakeMachine, *, mps: bool = True) -> tuple[Machine, Child, Child]:
    """An owner with 150 MiB guaranteed and a borrower with 50, on 256."""
    one = machine(mps=mps)
    one.run("set_limits('owner', 150 * MiB, 256 * MiB); set_limits('borrower', 50 * MiB, 256 * MiB)")
    return one, one.start(ASK, group="owner"), one.start(ASK, group="borrower")


def test_a_borrower_is_ended_when_the_owner_needs_its_own(machine: MakeMachine) -> None:
    one, owner, borrower = two_groups(machine)
    assert borrower.ask(200)[0] == "CUDA_SUCCESS"  # borrowing alone ends nobody

    assert owner.ask(100)[0] == "CUDA_SUCCESS"

    assert borrower.ask(1) == ["CUDA_ERROR_MPS_CLIENT_TERMINATED"]
    assert one.used_bytes() == 100 * MiB
    status = one.host.status()["devices"][0]
    assert status["eviction_count"] == 1
    assert [p["is_evicted"] for p in status["processes"] if p["pid"] == borrower.pid] == [True]
    borrower.kill()
    assert one.used_bytes() == 100 * MiB
    assert len(one.chunk_files()) == 1


def test_who_goes_beyond_its_soft_limit_evicts_nobody(machine: MakeMachine) -> None:
    _, owner, borrower = two_groups(machine)
    assert borrower.ask(150)[0] == "CUDA_SUCCESS"

    assert owner.ask(160) == ["CUDA_ERROR_OUT_OF_MEMORY"]
    assert borrower.ask(2)[0] == "CUDA_SUCCESS"


def test_without_mps_nobody_is_evicted(machine: MakeMachine) -> None:
    one, owner, borrower = two_groups(machine, mps=False)
    assert borrower.ask(200)[0] == "CUDA_SUCCESS"

    assert owner.ask(100) == ["CUDA_ERROR_OUT_OF_MEMORY"]

    one.host.set_mps(is_on=True)
    assert owner.ask(100)[0] == "CUDA_SUCCESS"


def test_processes_within_their_soft_limit_or_without_any_are_no_victims(machine: MakeMachine) -> None:
    one, owner, borrower = two_groups(machine)
    free = one.start(ASK)
    assert free.ask(150)[0] == "CUDA_SUCCESS"
    assert borrower.ask(50)[0] == "CUDA_SUCCESS"

    assert owner.ask(100) == ["CUDA_ERROR_OUT_OF_MEMORY"]
    assert [free.ask(2)[0], borrower.ask(2)[0]] == ["CUDA_SUCCESS"] * 2


def test_memory_that_others_share_outlives_an_eviction(machine: MakeMachine) -> None:
    one = machine(mps=True)
    one.run("set_limits('owner', 200 * MiB, 256 * MiB); set_limits('borrower', 0, 256 * MiB)")
    borrower = one.start(
        """
context(); keep = ok(create(20 * MiB)); descriptor = ok(cu.cuMemExportToShareableHandle(keep, FD, 0))
rest = ok(cu.cuMemAlloc(100 * MiB)); say('up'); wait(); say(error(cu.cuMemGetInfo())); wait()""",
        group="borrower",
    )
    borrower.hear()

    assert one.start(ASK, group="owner").ask(190)[0] == "CUDA_SUCCESS"
    assert borrower.ask() == "CUDA_ERROR_MPS_CLIENT_TERMINATED"
    assert one.used_bytes() == 210 * MiB
    borrower.kill()
    assert one.used_bytes() <= 190 * MiB


@pytest.mark.parametrize(
    ("text", "size", "result", "shown"),
    [
        ("0=100M", 100, "CUDA_SUCCESS", [0, 256]),
        ("0=100MB", 102, "CUDA_ERROR_OUT_OF_MEMORY", None),
        ("0=100M,7=1G", 200, "CUDA_SUCCESS", [56, 256]),  # one bad entry, and none holds
        ("100M", 200, "CUDA_SUCCESS", [56, 256]),
    ],
)
def test_a_client_can_have_a_limit_of_its_own(
    machine: MakeMachine, text: str, size: int, result: str, shown: list[int] | None
) -> None:
    child = machine(mps=True).start(ASK, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=text)

    assert child.ask(size) == [result, *(shown or [])]


def test_an_evicted_process_is_not_checkpointed(machine: MakeMachine) -> None:
    one, owner, borrower = two_groups(machine)
    assert borrower.ask(200)[0] == "CUDA_SUCCESS"
    assert owner.ask(100)[0] == "CUDA_SUCCESS"

    assert one.run(f"context(); say(error(cu.cuCheckpointProcessLock({borrower.pid}, None)))") == (
        "CUDA_ERROR_ILLEGAL_STATE"
    )
