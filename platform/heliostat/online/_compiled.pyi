from collections.abc import Sequence

from heliostat.features.aggregations import FloatArray
from heliostat.online.tiles import BoolArray

FORMAT: int

def merge(
    program: bytes,
    values: list[bytes | None],
    first: int,
    as_of_us: int,
    out: FloatArray,
    newest_us: FloatArray,
    absent: BoolArray,
    view: int,
    /,
) -> None: ...
def rings(values: list[bytes | None], ring_id: bytes, /) -> list[bytes]: ...
def names(prefixes: tuple[str, ...], tags: tuple[str, ...], texts: Sequence[str], /) -> list[str] | None: ...
