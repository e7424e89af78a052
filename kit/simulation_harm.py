"""What can be done to a running simulation: pauses, cuts, outages, rivals, traps, slow links, clocks; and healing."""

from typing import Final

from kit.simulation import Simulation
from kit.simulation_faults import Faults, Point
from kit.simulation_members import Member, Party

WAYS: Final = ("both", "in", "out")


def set_trap(simulation: Simulation, name: str, point: Point, *, down_s: float) -> bool:
    """Have it die when it next comes by this point of its work; False while it does not run."""
    member = simulation.members[name]
    if not member.is_active:
        return False
    member.trap, member.trap_down_s = point, down_s
    return True


def crash_loop(simulation: Simulation, name: str, *, count: int, every_s: float) -> None:
    """Killed again and again, each time soon after its start."""
    for number in range(count):
        simulation.after(number * every_s, lambda: simulation.crash(name, down_s=min(0.1, every_s / 2)))


def pause(simulation: Simulation, party: Party, *, lasts_s: float) -> None:
    """SIGSTOP, and SIGCONT later: it goes on as if no time had passed, whoever has taken over meanwhile."""
    if party.is_paused or (isinstance(party, Member) and not party.is_alive):
        return
    party.is_paused = True
    life = party.life
    if isinstance(party, Member):
        simulation.watch_lease(party.writer)

    def go_on() -> None:
        if party.life == life:
            resume(simulation, party)

    simulation.after(lasts_s, go_on)


def resume(simulation: Simulation, party: Party) -> None:
    party.is_paused = False
    frozen, party.frozen = party.frozen, []
    for action, payload in frozen:
        simulation.schedule(simulation.now_s, action, party, payload)


def cut(simulation: Simulation, party: Party, *, lasts_s: float, way: str = "both") -> None:
    """Its link to the bus is cut, both ways or one; everything else it is linked to goes on."""
    until_s = simulation.now_s + lasts_s
    if way != "out":
        party.cut_in_until_s = max(party.cut_in_until_s, until_s)
        simulation.wire.stop_reading(party)
    if way != "in":
        party.cut_out_until_s = max(party.cut_out_until_s, until_s)
    if isinstance(party, Member):
        simulation.watch_lease(party.writer)
    simulation.after(lasts_s, lambda: reconnect(simulation, party))


def bus_away(simulation: Simulation, *, lasts_s: float) -> None:
    """NATS is away for all: appends are unknown, readers blind, fleeting messages lost, commands are sent again."""
    simulation.bus_away_until_s = max(simulation.bus_away_until_s, simulation.now_s + lasts_s)
    for party in simulation.parties:
        simulation.wire.stop_reading(party)

    def back() -> None:
        if simulation.now_s < simulation.bus_away_until_s:
            return
        for party in simulation.parties:
            reconnect(simulation, party)
        for writer in list(simulation.holders):
            simulation.watch_lease(writer)

    simulation.after(lasts_s, back)


def reconnect(simulation: Simulation, party: Party) -> None:
    """Read on and start what could not start, if the bus reaches it now."""
    if not simulation.hears(party):
        return
    if not isinstance(party, Member):
        simulation.wire.read_on(party)
        return
    if party.is_waiting_for_bus and simulation.is_heard(party):
        party.is_waiting_for_bus = False
        simulation.come_back(party)
    elif party.is_active:
        simulation.wire.read_on(party)
        simulation.read_inbox(party, None)


def rival(simulation: Simulation, writer: str) -> bool:
    """Start the standby beside its healthy twin, as when the lease was lost by mistake; False when there is none."""
    for member in simulation.members.values():
        if member.writer == writer and member.is_standby:
            simulation.holders[writer] = member
            simulation.start(member)
            return True
    return False


def slow_link(simulation: Simulation, party: Party, *, extra_s: float, lasts_s: float) -> None:
    """Every message to and from it takes so much longer, one way."""
    party.extra_latency_s += extra_s

    def quick_again() -> None:
        party.extra_latency_s = max(0.0, party.extra_latency_s - extra_s)

    simulation.after(lasts_s, quick_again)


def jump_clock(member: Member, *, by_s: float) -> None:
    """Its host's clock is set; negative: back."""
    member.skew_s += by_s


def heal(simulation: Simulation) -> None:
    """No more faults: links and the bus are back, who was paused goes on. Clocks stay as they are."""
    simulation.faults = Faults()
    simulation.bus_away_until_s = 0.0
    for party in simulation.parties:
        party.cut_in_until_s = party.cut_out_until_s = 0.0
        party.extra_latency_s = 0.0
        if isinstance(party, Member):
            party.trap = None
    for party in simulation.parties:
        if party.is_paused:
            resume(simulation, party)
        reconnect(simulation, party)
    for writer in list(simulation.holders):
        simulation.watch_lease(writer)
