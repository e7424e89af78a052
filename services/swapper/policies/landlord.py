"""`landlord`: each use buys credit, its restore seconds per byte; all pay the same rent per byte when room is needed.

Rent is not taken off every credit: it is counted up in `_rent`, and credit is bought on top of it.
(N. E. Young, "On-line file caching", Algorithmica 33, 2002; of one size and one cost it is LRU.)
"""

from services.swapper.policies.port import Remembering, Worth


class Landlord(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self._rent = 0.0
        self._credit: dict[str, float] = {}
        """{key: rent so far plus what it has left}, both per byte"""
        self._price: dict[str, float] = {}
        """{key: restore seconds per byte}, as last heard"""

    def used(self, key: str, *, now_s: float, was_idle: bool) -> None:
        super().used(key, now_s=now_s, was_idle=was_idle)
        self._credit[key] = self._rent + self._price.get(key, 0.0)

    def restored(self, key: str, *, now_s: float, restore_s: float, size_bytes: int) -> None:
        self._price[key] = restore_s / max(1, size_bytes)
        self._credit[key] = self._rent + self._price[key]

    def parked(self, key: str, *, now_s: float) -> None:
        self._rent = max(self._rent, self._credit.pop(key, self._rent))

    def forgotten(self, key: str) -> None:
        super().forgotten(key)
        self._credit.pop(key, None)
        self._price.pop(key, None)

    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        return (self._credit.get(key, self._rent), max(since_s, self.usage(key).last_used_s))
