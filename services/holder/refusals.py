"""What the holder will not do, as its callers read it."""


class Refused(Exception):
    """`status` is HTTP's: 404 for what is not there, 409 for what contradicts what runs, 503 for not now."""

    def __init__(self, reason: str, *, status: int = 409) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
