"""What is derived from the message types, as file contents by path. `python -m schemas` writes and checks it."""

import json
from typing import Any, Final

from schemas.generators.asyncapi import asyncapi
from schemas.generators.message_schema import message_schema
from schemas.generators.models_file import models_schema
from schemas.generators.reference import events_page

COMMAND: Final = "python -m schemas"


def outputs() -> dict[str, str]:
    """Contents by path, relative to the checkout. Equal types give equal bytes."""
    return {
        "schemas/generated/messages.schema.json": _json(message_schema()),
        "schemas/generated/asyncapi.json": _json(asyncapi()),
        "sublet/models.schema.json": _json(models_schema()),
        "docs/reference/events.md": events_page(),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
