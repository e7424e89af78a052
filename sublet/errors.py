"""What can go wrong, as a person and a script need it: a code, one sentence, facts, cause, fix, exit code."""

from __future__ import annotations

from typing import Any, ClassVar


class SubletError(Exception):
    """Base of all errors of the client. `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1
    code: str = "failed"

    def __init__(
        self, message: str, *, facts: tuple[str, ...] = (), cause: str = "", fix: str = "", code: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        self.cause = cause
        self.fix = fix
        if code:
            self.code = code

    def details(self) -> list[str]:
        """Lines that go before the sentence, for a person."""
        return []

    def as_json(self) -> dict[str, Any]:
        """The documented error object that ``--json`` puts on stderr."""
        return {
            "schema": "sublet.error.v1",
            "code": self.code,
            "message": self.message,
            "facts": list(self.facts),
            "cause": self.cause,
            "fix": self.fix,
            "exit_code": self.exit_code,
        }


class Failed(SubletError):
    """It was tried and did not work out."""


class InvalidInput(SubletError):
    """Wrong use, or a file that cannot be read as it stands."""

    exit_code = 2
    code = "invalid_input"


class NotPlaced(SubletError):
    """The wish is sound, but no GPU can take it now."""

    exit_code = 3
    code = "not_placed"


class NotFound(SubletError):
    """No model, key or replica of this name."""

    exit_code = 4
    code = "not_found"


class Refused(SubletError):
    """The control plane will not do it: a permission, a quota, a grade, an invalid wish."""

    exit_code = 5
    code = "refused"


class TimedOut(SubletError):
    """The deadline passed. What was asked for is stored, and the work goes on."""

    exit_code = 6
    code = "timed_out"


class Unreachable(SubletError):
    """Nobody answers: the control plane is down, or the address is wrong."""

    exit_code = 7
    code = "unreachable"


# What placement answers for a model and for a key that it does not know.
NOT_FOUND_CODES = frozenset({"SUB-MDL-001", "SUB-KEY-003"})


def rejection(message: str, code: str) -> SubletError:
    """The error for a rejected command, by the code that placement gave."""
    kind = NotFound if code in NOT_FOUND_CODES else Refused
    return kind(message, code=code)
