"""The online read in C, where the package was built with a compiler; numpy gives the same bits where it wasn't.

For a hundred entities numpy's arrays cost ten times what their numbers do, and for one entity they are
nearly all of it. So what most features need of their rings is written down once as a program, a
`MergeProgram`, and `_compiled.c` runs it over the bytes as the store gave them. `heliostat.online.merging`
is the definition: it covers all functions, and tests hold the two together, bit by bit.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence

import numpy as np

from heliostat.features.aggregations import (
    Aggregation,
    Count,
    CountDistinct,
    DistinctDays,
    First,
    FloatArray,
    Last,
    Latest,
    Max,
    Mean,
    Min,
    Sum,
    TimeSinceLast,
)
from heliostat.online.merging import MergePlan
from heliostat.online.tiles import BoolArray
from heliostat.storage.bundles import rings_in

try:
    from heliostat.online import _compiled
except ImportError:  # built without a compiler
    _compiled = None  # type: ignore[assignment]

_FORMAT = 2
AVAILABLE = _compiled is not None and _compiled.FORMAT == _FORMAT and sys.byteorder == "little"
"""Whether the package was built with it, and for a machine that stores numbers as rings do."""

_ID = struct.Struct("<2q")
_OPERATORS = {"add": 0, "min": 1, "max": 2, "or": 3, "first": 4, "last": 5}
_PLAIN, _RATIO, _SINCE, _EDGE, _MEMBERS = range(5)
_NULL_AT: dict[type[Aggregation], float] = {
    Count: np.nan, Sum: np.nan, Min: np.inf, Max: -np.inf, DistinctDays: 0.0,
}  # fmt: skip
"""Of functions whose value is their only state: what that holds where the value is null; NaN if it never is."""


def can_run(aggregation: Aggregation) -> bool:
    """Whether a `MergeProgram` can have it."""
    return AVAILABLE and _finish(aggregation) is not None


def _finish(aggregation: Aggregation) -> tuple[int, float] | None:
    """How the value follows from its states; None if the program has no word for it."""
    kind = type(aggregation)
    if kind in _NULL_AT:
        return _PLAIN, _NULL_AT[kind]
    if kind in (First, Last, Latest):
        return _EDGE, 0.0
    if kind is Mean:
        return _RATIO, 0.0
    if kind is CountDistinct:
        return _MEMBERS, 0.0
    if isinstance(aggregation, TimeSinceLast):
        return _SINCE, float(aggregation.unit_us)
    return None


class MergeProgram:
    """A view's merge as `_compiled.c` reads it.

    Args:
        plan: What is merged; the bundles with its rings are given.
        columns: Aggregated features of the plan, and the column that each comes into. They all `can_run`.
    """

    def __init__(self, plan: MergePlan, columns: Sequence[tuple[str, int]]) -> None:
        labels = {group.label: at for at, group in enumerate(plan.groups)}
        steps: dict[tuple[str, int | None], list[int]] = {}
        places: dict[tuple[str, int | None, str], int] = {}
        features, n_scratch = list[tuple[int, int, int, int, float]](), 0
        for name, column in columns:
            aggregation, _ = plan.features[name]
            group, states = plan.layout.group_of(name), aggregation.states()
            window = group.label, aggregation.window_us
            for state in states:
                if (*window, state.key) not in places:
                    step = _OPERATORS[state.merge_across], group.columns[state.key].start, n_scratch
                    steps.setdefault(window, []).extend(step)
                    places[(*window, state.key)] = n_scratch
                    n_scratch += state.width
            parts = [places[(*window, state.key)] for state in states]
            kind, number = _finish(aggregation) or (-1, np.nan)
            features.append((kind, parts[0], parts[-1], column, number))
        windows, n_steps = list[int](), 0
        for (label, window_us), words in steps.items():
            windows += [labels[label], -1 if window_us is None else window_us, n_steps, len(words) // 3]
            n_steps += len(words) // 3
        ttl_us, last_event = plan.layout.view.ttl_us, plan.last_event_column
        head = [_FORMAT, len(plan.groups), len(steps), n_steps, len(features), n_scratch]
        head += [-1, 0] if ttl_us is None or last_event is None else [ttl_us, last_event]
        groups = [
            word
            for group in plan.groups
            for word in (group.hop_us, group.width, int(group.life), *_ID.unpack(group.ring_id))
        ]
        words = [*head, *groups, *windows, *(word for each in steps.values() for word in each)]
        finishes = [struct.pack("<4qd", *each) for each in features]
        self._code = b"".join([struct.pack(f"<{len(words)}q", *words), *finishes])

    def run(
        self,
        values: Sequence[bytes | None],
        first: int,
        as_of_us: int,
        *,
        out: FloatArray,
        newest_us: FloatArray,
        absent: BoolArray,
        view: int,
    ) -> None:
        """Merge the rings of ``n`` entities.

        Args:
            values: Bundles, as the store gives them; ``n`` of each source and entity.
            first: Where the plan's begin.
            as_of_us: Query instant, later than every event in the rings.
            out: Takes the features, shape ``(n, …)``, of any strides.
            newest_us: Shape ``(n,)``; takes where the newest tile begins, if that is later, or NaN is there.
            absent: Shape ``(n, n_views)``; takes whether the view is.
            view: In which column.

        Raises:
            ValueError: If a value isn't a bundle, or a ring's length no multiple of a slot's.
        """
        _compiled.merge(
            self._code,
            values if isinstance(values, list) else list(values),
            first,
            as_of_us,
            out,
            newest_us,
            absent,
            view,
        )


def rings_of(values: Sequence[bytes | None], ring_id: bytes) -> list[bytes]:
    """One ring of each bundle; empty where there is none.

    Args:
        values: Bundles, as the store gives them.
        ring_id: Which.

    Raises:
        ValueError: If a value isn't a bundle.
    """
    if AVAILABLE:
        return _compiled.rings(values if isinstance(values, list) else list(values), ring_id)
    return [rings_in(value).get(ring_id, b"") for value in values]


def bundle_names(prefixes: tuple[str, ...], tags: tuple[str, ...], texts: Sequence[str]) -> list[str] | None:
    """Names of the bundles of integer keys, prefix by prefix; None where Python has to look at them.

    Args:
        prefixes: What the bundles' names begin with.
        tags: What comes next, by bucket.
        texts: The keys.
    """
    return _compiled.names(prefixes, tags, texts) if AVAILABLE else None
