"""What a container says, kept in a file like that of a process: bounded, and there when the container is gone."""

from pathlib import Path


class LogFile:
    """Grows to a bound, then becomes ``.1``, which is overwritten: two of these per replica."""

    def __init__(self, path: Path, *, bytes_max: int) -> None:
        self.path = path
        self._bytes_max = bytes_max

    def write(self, text: str) -> None:
        if self.size_bytes() > self._bytes_max:
            self.path.replace(self.path.with_suffix(self.path.suffix + ".1"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def written_at_s(self) -> float:
        """When it was last written to, in seconds since 1970; 0 when it never was."""
        return self.path.stat().st_mtime if self.path.exists() else 0.0
