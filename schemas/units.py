"""Types that say what a number means. The unit is also the last word of every field's name."""

from typing import Annotated, Final

from msgspec import Meta

Bytes = Annotated[int, Meta(ge=0, description="bytes")]
Seconds = Annotated[float, Meta(ge=0, description="seconds")]
Milliseconds = Annotated[int, Meta(ge=0, description="milliseconds")]
UnixSeconds = Annotated[float, Meta(ge=0, description="seconds since the Unix epoch, in stream time")]
Sequence = Annotated[int, Meta(ge=0, description="a stream sequence; 0 means before the first message")]
Count = Annotated[int, Meta(ge=0)]
Epoch = Annotated[int, Meta(ge=0)]
Portion = Annotated[float, Meta(gt=0, description="a part of one GPU's allocatable bytes; above 1 never fits one GPU")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[
    str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="lower-case letters, digits, hyphens")
]
ModelName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/:-]{0,126}[A-Za-z0-9])?$", description="the name that clients use")
]
Identifier = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/-]+$")]


def spread_evenly(total: int, count: int) -> tuple[int, ...]:
    """Whole numbers that differ by at most 1 and sum up to `total`; the larger ones first."""
    each, more = divmod(total, count)
    return (each + 1,) * more + (each,) * (count - more)


KiB: Final = 1024
MiB: Final = 1024**2
GiB: Final = 1024**3
GB: Final = 1000**3
