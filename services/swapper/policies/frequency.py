"""`lfu`: who was asked for least often gives way, ever since it is known; of equals who was used longest ago."""

from services.swapper.policies.port import Remembering, Worth


class Frequency(Remembering):
    def worth(self, key: str, *, now_s: float, since_s: float, restore_s: float, size_bytes: int) -> Worth:
        usage = self.usage(key)
        return (usage.use_count, max(since_s, usage.last_used_s))
