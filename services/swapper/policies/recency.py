"""`lru`: who was used longest ago gives way."""

from services.swapper.policies.port import Remembering, Worth


class Recency(Remembering):
    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        return (max(since_s, self.usage(key).last_used_s),)
