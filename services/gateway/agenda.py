"""When what is due. Pure: it only orders times that it is given."""

import heapq

Key = tuple[str, str]
"""What is due (a kind and an id). Ties in time go by key, so that the order never depends on chance."""


class Agenda:
    """At most one due time per key; setting it again replaces it. Every operation is O(log n)."""

    def __init__(self) -> None:
        self._due_s: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def set(self, key: Key, due_s: float) -> None:
        if self._due_s.get(key) != due_s:
            self._due_s[key] = due_s
            heapq.heappush(self._heap, (due_s, key))
            self._compact()

    def discard(self, key: Key) -> None:
        self._due_s.pop(key, None)

    def pop_due(self, now_s: float) -> list[Key]:
        """The keys whose time has come, earliest first; they are forgotten."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            due_s, key = heapq.heappop(self._heap)
            if self._due_s.get(key) == due_s:
                del self._due_s[key]
                due.append(key)
        return due

    def next_due_s(self) -> float | None:
        while self._heap and self._due_s.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _compact(self) -> None:
        """Replaced entries stay in the heap until their time; rebuild it before they outweigh the live ones."""
        if len(self._heap) > 64 + 4 * len(self._due_s):
            self._heap = [(due_s, key) for key, due_s in self._due_s.items()]
            heapq.heapify(self._heap)
