"""A bucket's events -> its entities' rings, as history has them. Pure.

`heliostat.features.materialize` reads the events and sends the rings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from heliostat.features.aggregations import evaluate
from heliostat.features.definitions import FeatureView
from heliostat.features.tiles import RingGroup, RingLimits, TileStates, pack_rings, ring_layout, tile_states
from heliostat.schema import TIE, times_us
from heliostat.storage.online_store import OnlineKeys, RingWrite

_RINGS_AT_ONCE_BYTES = 64 * 2**20


def bucket_rings(
    views: Sequence[FeatureView],
    events: pa.Table,
    *,
    bucket: int,
    keys: OnlineKeys,
    as_of_us: int,
    limits: RingLimits,
) -> Iterator[RingWrite]:
    """The rings of one bucket's entities, as its events have them.

    Args:
        views: All of one source and entity.
        events: Distinct events before ``as_of_us``, in any order: the columns of
            `heliostat.features.offline.needed_columns`, and ``_tie``.
        bucket: The bucket's number.
        keys: The store's key names.
        as_of_us: The instant that the rings are made for.
        limits: What the rings' layouts allow for.

    Yields:
        One write for each entity and group with an event in reach.
    """
    source, entity = views[0].source, views[0].entity
    encoded = entity.encode(events, what=f"events of {source.name!r}").dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    times, ties = times_us(events.column(source.event_time)), times_us(events.column(TIE))
    order = np.lexsort((ties, times, codes))
    codes, times, ties, events = codes[order], times[order], ties[order], events.take(pa.array(order))
    texts = encoded.dictionary.cast(pa.string()).to_pylist()
    layouts = [ring_layout(view, limits) for view in views]
    inputs = evaluate(events, [given for layout in layouts for given in layout.inputs])
    for layout in layouts:
        for group in layout.groups:
            tiles = tile_states(group, codes, times, ties, inputs)
            prefix = f"{keys.ring_prefix(layout.view.ref, group.name)}{{b{bucket}}}:"
            yield from _writes(group, tiles, texts, prefix, as_of_us, limits)


def _writes(
    group: RingGroup, tiles: TileStates, texts: Sequence[str], prefix: str, as_of_us: int, limits: RingLimits
) -> Iterator[RingWrite]:
    if not group.life:
        newest = as_of_us // group.hop_us
        tiles = tiles.between(newest - group.n_slots + 1, newest)
    first_live = limits.first_live_tile(as_of_us, group.hop_us)
    step = max(1, _RINGS_AT_ONCE_BYTES // len(group.empty_ring))
    for first in range(0, len(texts), step):
        own = tiles.of_entities(first, first + step)
        present = np.unique(own.codes)
        own = TileStates(np.searchsorted(present, own.codes), own.tiles, own.slots)
        rings = pack_rings(group, own, len(present), as_of_us=as_of_us, limits=limits)
        for position, code in enumerate(present.tolist()):
            yield RingWrite(prefix + texts[first + code], group.descriptor, first_live, rings[position].tobytes())
