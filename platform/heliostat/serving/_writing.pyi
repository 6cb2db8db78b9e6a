from collections.abc import Callable

def entities(
    ids: bytes,
    scores: bytes,
    request_id: str,
    variants: list[str],
    versions: list[int],
    missing: list[tuple[str, ...]],
    absent: list[tuple[str, ...]],
    frame: Callable[[str, int, tuple[str, ...], tuple[str, ...]], tuple[bytes, ...]],
    /,
) -> bytes: ...
