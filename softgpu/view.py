"""A host's status as text for people."""

from collections.abc import Iterable, Sequence

from softgpu.host import DeviceStatus, FaultStatus, GroupStatus, HostStatus, ProcessStatus

_BAR_CELLS = 40
_ALWAYS = "always"


def gib(count: int) -> str:
    return f"{count / 1024**3:.2f} GiB"


def status_text(status: HostStatus) -> str:
    """All of it: one part for each GPU, then limits and faults where there are any."""
    parts = ["\n".join(_title(status))]
    parts += ["\n".join(_device(device)) for device in status["devices"]]
    if status["groups"]:
        parts.append("\n".join(["Limits", *_limits(status["groups"])]))
    if status["faults"]:
        parts.append("\n".join(["Faults", *_faults(status["faults"])]))
    return "\n\n".join(parts)


def _title(status: HostStatus) -> list[str]:
    major, minor, patch = (
        status["driver_version"] // 1000,
        status["driver_version"] % 1000 // 10,
        status["driver_version"] % 10,
    )
    words = [
        "software GPU",
        f"CUDA {major}.{minor}.{patch}",
        "phantom" if status["is_phantom"] else "real bytes",
        *(["MPS"] if status["is_mps"] else []),
        f"{status['chunk_count']} pieces of memory",
    ]
    return [f"{status['directory']}  ({', '.join(words)})"]


def _device(device: DeviceStatus) -> list[str]:
    used_bytes = device["used_bytes"] + device["reserved_bytes"]
    used_fraction = used_bytes / device["total_bytes"] if device["total_bytes"] else 0.0
    free_bytes = device["total_bytes"] - used_bytes
    speeds = [
        f"{_speed(device['h2d_bytes_per_s'])} in",
        f"{_speed(device['d2h_bytes_per_s'])} out",
        f"{_speed(device['pageable_bytes_per_s'])} pageable",
    ]
    lost = "  LOST" if device["is_lost"] else ""
    if device["is_mig"]:
        lost += "  cut into MIG instances"
    lines = [
        f"GPU {device['index']}  {device['name']}  {device['uuid']}{lost}",
        f"  {_bar(used_fraction)} {gib(used_bytes)} of {gib(device['total_bytes'])} used, {gib(free_bytes)} free",
        f"  link {', '.join(speeds)}",
    ]
    if device["eviction_count"]:
        lines.append(f"  clients evicted by MPS: {device['eviction_count']}")
    if device["processes"]:
        rows = [_process(process) for process in device["processes"]]
        lines += _table([("pid", "command", "group", "memory", "state"), *rows])
    return lines


def _process(process: ProcessStatus) -> tuple[str, ...]:
    state = process["state"]
    if process["is_evicted"]:
        state = "evicted"
    elif process["away_bytes"]:
        state += f", {gib(process['away_bytes'])} away"
    if process["poison_code"]:
        state += f", broken by error {process['poison_code']}"
    return str(process["pid"]), process["command"], process["group"] or "-", gib(process["used_bytes"]), state


def _limits(groups: Iterable[GroupStatus]) -> list[str]:
    rows = [("group", "GPU", "soft", "hard", "used", "")]
    for group in groups:
        for limit in group["limits"]:
            hard_bytes = limit["hard_bytes"]
            if hard_bytes is None and not limit["soft_bytes"]:
                continue
            above = "above soft" if limit["used_bytes"] > limit["soft_bytes"] else ""
            rows.append(
                (
                    group["name"],
                    str(limit["device"]),
                    gib(limit["soft_bytes"]),
                    "max" if hard_bytes is None else gib(hard_bytes),
                    gib(limit["used_bytes"]),
                    above,
                )
            )
    return _table(rows)


def _faults(faults: Iterable[FaultStatus]) -> list[str]:
    rows = [("function", "after", "times", "what")]
    for fault in faults:
        what = {"code": f"returns {fault['value']}", "delay": f"{fault['value'] / 1e6:g} ms longer"}.get(
            fault["kind"], fault["kind"]
        )
        times = _ALWAYS if fault["times"] < 0 else str(fault["times"]) if fault["times"] else "used up"
        rows.append((fault["function"], str(fault["after"]), times, what))
    return _table(rows)


def _bar(fraction: float) -> str:
    filled = min(_BAR_CELLS, round(fraction * _BAR_CELLS))
    return f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {fraction:4.0%}"


def _speed(bytes_per_s: int) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s else "unlimited"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
