"""Writes the diagram and the tables of docs/residency.md from the agent's table; `--check` only says whether they are.

The rest of the page is written by hand, around the two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.nodeagent.settings import NodeAgentSettings  # noqa: E402  # After the path to it.
from services.nodeagent.transitions import STATES, TRANSITIONS, Residency, allowed_s  # noqa: E402

PAGE = REPOSITORY / "docs" / "residency.md"
BEGIN = "<!-- Made from services/nodeagent/transitions.py by `make docs`; do not edit up to the next mark. -->\n"
END = "<!-- End of what is made. -->\n"


def main(arguments: list[str]) -> int:
    """Exit status: 1 when the page has no marks, or with `--check` when it is not current."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"residency_page: {PAGE.name} lacks one of its two marks:\n{BEGIN}{END}", file=sys.stderr)
        return 1
    wanted = before + BEGIN + made() + END + after
    if "--check" not in arguments:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print("residency_page: docs/residency.md is not current; run make docs and commit it", file=sys.stderr)
    return 1


def made() -> str:
    """The diagram, the states, the transitions."""
    return f"\n{diagram()}\n{states()}\n{transitions()}\n"


def diagram() -> str:
    """Without an engine's end and releases: they lead from nearly everywhere, as the table of transitions says."""
    everywhere = {Residency.SUSPECT, Residency.RELEASING, Residency.FAILED}
    lines = ["```mermaid", "stateDiagram-v2"]
    for row in TRANSITIONS:
        if row.source == row.target or everywhere & {row.source, row.target} - {None}:
            continue
        if row.target is Residency.GRANTED and row.cause.value == "ReplicaFailed":
            continue
        lines.append(f"    {row.source or '[*]'} --> {row.target or '[*]'}: {row.cause}")
    for row in TRANSITIONS:
        if _is_adoption(row.source, row.target):
            lines.append(f"    suspect --> {row.target}: {row.cause}")
        elif row.target is Residency.SUSPECT and row.source is not row.target:
            lines.append(f"    {row.source} --> suspect")
    return "\n".join([*lines, "```", ""])


def _is_adoption(source: Residency | None, target: Residency | None) -> bool:
    return source is Residency.SUSPECT and target in (Residency.RESIDENT, Residency.PARKED)


def states() -> str:
    settings = NodeAgentSettings()
    rows = ["| State | What happens | Its lease holds | At most |", "|---|---|---|---|"]
    for residency, state in STATES.items():
        names = " + ".join(f"`{name}`" for name in state.deadline_settings)
        limit = f"{allowed_s(residency, settings):.0f} s: {names}" if names else ""
        rows.append(f"| `{residency}` | {state.meaning} | {state.holds} | {limit} |")
    return "\n".join([*rows, ""])


def transitions() -> str:
    """One row for each fact and where it leads, with all the states that it leads from."""
    sources: dict[tuple[str, str], list[str]] = {}
    for row in TRANSITIONS:
        target = f"`{row.target}`" if row.target else "no lease"
        sources.setdefault((row.cause, target), []).append(f"`{row.source}`" if row.source else "no lease")
    rows = ["| Fact | From | To |", "|---|---|---|"]
    rows += [f"| {cause} | {', '.join(found)} | {target} |" for (cause, target), found in sources.items()]
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
