"""What the broker will not do, as its callers read it."""

from schemas.brokers import BrokerRefused


class Refused(Exception):
    """Nothing was done. One sentence; what is missing where bytes were; when asking again may help."""

    def __init__(self, sentence: str, *, short_by_bytes: int = 0, again_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.short_by_bytes = short_by_bytes
        self.again_after_s = again_after_s

    def message(self) -> BrokerRefused:
        return BrokerRefused(
            refused=self.sentence, short_by_bytes=self.short_by_bytes, again_after_s=self.again_after_s
        )
