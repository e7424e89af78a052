"""`python -m services up` and `python -m services demo`."""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    name, *rest = arguments
    if name == "demo":
        from services.local.demo import main as demo

        return demo(rest)
    from services.local.up import main as up

    return up(rest)
