"""How far the download of an image is, from what Docker tells about each layer. Pure."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from schemas.units import GB

DONE: Final = frozenset({"Pull complete", "Already exists"})
DOCKER_HUB: Final = "docker.io"
DOCKER_HUB_KEY: Final = "https://index.docker.io/v1/"


@dataclass(slots=True, kw_only=True)
class PullProgress:
    """Fed with Docker's lines."""

    image: str
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """{layer: bytes that are here, bytes in all}; 0 in all: not told yet."""
    done: set[str] = field(default_factory=set)

    def add(self, line: Mapping[str, Any]) -> None:
        layer, detail = line.get("id"), line.get("progressDetail") or {}
        if layer is None or str(line.get("status", "")).startswith("Pulling from"):
            return
        known = self.layers.setdefault(layer, (0, 0))
        if line.get("status") == "Downloading" and "current" in detail:
            self.layers[layer] = (int(detail["current"]), int(detail.get("total") or known[1]))
        elif line.get("status") in ("Download complete", *DONE):
            self.layers[layer] = (known[1], known[1])
        if line.get("status") in DONE:
            self.done.add(layer)

    def told(self) -> str:
        """One line for the engine's log."""
        here, total = (sum(sizes) for sizes in zip(*self.layers.values(), strict=True)) if self.layers else (0, 0)
        counts = f"{len(self.done)} of {len(self.layers)} layers"
        return f"sublet: pulling {self.image}: {here / GB:.1f} of {total / GB:.1f} GB known, {counts}"


def registry_of(image: str) -> str:
    """The host in an image's name; Docker Hub when there is none."""
    first, has_host, _ = image.removeprefix(f"{DOCKER_HUB}/").partition("/")
    return first if has_host and ("." in first or ":" in first or first == "localhost") else DOCKER_HUB


def whole_name(image: str) -> str:
    """With its registry, as a login is sent along for it."""
    return image if registry_of(image) != DOCKER_HUB or "/" not in image else f"{DOCKER_HUB}/{image}"


def credentials(config: Mapping[str, Any], image: str) -> dict[str, str] | None:
    """Name and password for the image's registry from Docker's own ``config.json``; None when it has none there.

    Those that Docker keeps in a helper of its own are not found.
    """
    registry = registry_of(image)
    key = DOCKER_HUB_KEY if registry == DOCKER_HUB else registry
    auths = config.get("auths") or {}
    entry = auths.get(key) or auths.get(f"https://{registry}") or {}
    try:
        username, colon, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return {"username": username, "password": password, "serveraddress": key} if colon else None
