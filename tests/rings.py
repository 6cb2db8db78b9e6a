"""Rings as history makes them, without a log and without a server: what reads need to be tested."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from heliostat.features.definitions import FeatureView
from heliostat.features.inputs import evaluate
from heliostat.online.tiles import RingLimits, pack_rings, ring_layout, tile_states
from heliostat.schema import hash64, tie48, times_us
from heliostat.storage.bundles import rings_in
from heliostat.storage.online_store import OnlineKeys


def bundled(rings: Mapping[bytes, bytes]) -> bytes:
    """The bundle of one entity's rings, by id; empty without any."""
    there = {each: ring for each, ring in rings.items() if ring}
    entries = [struct.pack("<16sd", each, len(ring)) for each, ring in there.items()]
    return b"".join([struct.pack("<d", len(there)), *entries, *there.values()]) if there else b""


def rings_of(
    views: Sequence[FeatureView],
    events: pa.Table,
    *,
    keys: OnlineKeys,
    n_buckets: int,
    as_of_us: int,
    limits: RingLimits,
) -> dict[str, bytes]:
    """What the online store holds of views after events of their source: each entity's bundle, by key."""
    found: dict[str, dict[bytes, bytes]] = {}
    for view in views:
        source, entity = view.source, view.entity
        before = events.filter(pa.array(times_us(events.column(source.event_time)) < as_of_us))
        encoded = entity.encode(before)
        distinct = encoded.unique()
        codes = encoded.dictionary_encode().indices.to_numpy().astype(np.int64)
        times, ties = times_us(before.column(source.event_time)), tie48(hash64(before.column(source.event_id)))
        order = np.lexsort((ties, times, codes))
        layout = ring_layout(view, limits)
        inputs = evaluate(before.take(pa.array(order)), list(layout.inputs))
        buckets, texts = entity.buckets(distinct, n_buckets), distinct.cast(pa.string()).to_pylist()
        for group in layout.groups:
            tiles = tile_states(group, codes[order], times[order], ties[order], inputs)
            packed = pack_rings(group, tiles, len(texts), as_of_us=as_of_us, limits=limits)
            for text, bucket, ring in zip(texts, buckets.tolist(), packed.to_bytes().split(), strict=True):
                if ring:
                    key = keys.bundle(source.name, entity.name, text, bucket)
                    found.setdefault(key, {})[group.ring_id] = ring
    return {key: bundled(rings) for key, rings in found.items()}


def rings_held(
    content: Mapping[str, bytes | None], views: Sequence[FeatureView], limits: RingLimits
) -> dict[str, bytes]:
    """Each ring of views in bundles by key, as ``view@version:layout:entity's key``."""
    groups = [group for view in views for group in ring_layout(view, limits).groups]
    return {
        f"{group.view_ref}:{group.name}:{key.split('}:', 1)[1]}": ring
        for key, value in content.items()
        for group in groups
        if (ring := rings_in(value).get(group.ring_id)) is not None
    }
