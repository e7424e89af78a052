"""What can go wrong with a software GPU host, as the caller sees it."""


class SoftgpuError(Exception):
    """Base of all errors of this package."""


class BuildError(SoftgpuError):
    """The driver libraries could not be built; the text is one sentence with the remedy."""


class HostError(SoftgpuError):
    """A host could not be created, or one of its switches refused; the text says why."""
