"""Events and query instants in, feature rows out: the numpy kernel behind every offline vector.

It answers for one bucket of entities at a time and follows the window contract to the bit:
a row depends on nothing but the events inside its windows. No running total of one entity
is ever subtracted from another's, so a 1e12 here costs nobody there a cent.

How it works, for ``n`` events and ``m`` rows in ``O((n + m) log n)`` whatever the windows' lengths:

1. Events of the entities asked for are ordered by (entity, event time, tie); a window is
   then a range of positions, found by two binary searches.
2. Counts, distinct days, first and last follow from integers over those ranges, exactly.
3. Sums, minima, maxima, sets and moments are taken tile by tile, in order of time. ``K`` tiles of a window
   always lie in two neighbouring blocks of ``K`` tiles: the end of one, accumulated backwards,
   and the beginning of the next, accumulated forwards (van Herk 1992). Both hold only events
   of the window, and three look-ups answer a row.
4. A quantile is the n-th of a range of bins, found bit by bit; nobody counts them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY
from heliostat.errors import DefinitionError, InvalidValueError
from heliostat.features.aggregations import (
    Aggregation,
    FloatArray,
    Input,
    Quantile,
    State,
    check_input,
    evaluate,
)
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.entity_codes import EntityCodes
from heliostat.features.inputs import OrderedInput
from heliostat.features.sketches import rank
from heliostat.features.states import emptied
from heliostat.features.timeline import (
    FOLDS,
    EventIndex,
    IntArray,
    Parts,
    Ranges,
    Tiles,
    counted,
    edges,
    nth_smallest,
    tiles_with,
)
from heliostat.features.windows import lower_edge_us
from heliostat.schema import INGESTED, TIE, hash64, tie48, times_us


def compute_features(
    views: Sequence[FeatureView],
    events: pa.Table,
    keys: pa.Array,
    as_of_us: IntArray,
    *,
    known_at_us: int | None = None,
    request: Mapping[str, FloatArray] | None = None,
    deduplicate: bool = True,
) -> dict[str, FloatArray]:
    """Compute the features of views for entities at instants.

    Args:
        views: All of the same source and entity.
        events: Columns of the source (those of `needed_columns` are enough), ``n`` rows in any order; of
            the event log's columns ``_tie`` is used when present.
        keys: Encoded keys of the rows asked for (`Entity.encode`), length ``m``; unknown ones are fine.
        as_of_us: Query instants, shape ``(m,)``, microseconds.
        known_at_us: Only events ingested at or before this instant count; needs ``_ingested_us``.
        request: What each row brings itself, shape ``(m,)`` by name. Features that need something else of a
            request are left out.
        deduplicate: Drop repeated event ids, the first ingested stays. False for events of the event
            log, which holds each id once.

    Returns:
        Arrays of shape ``(m,)`` by qualified feature name ``view__feature``, in the order of the
        views and of their features; NaN is null.

    Raises:
        InvalidValueError: If ``known_at_us`` is given and the events don't say when they were ingested.
    """
    view = views[0]
    events = _known(events, known_at_us)
    if deduplicate:
        events = unique_events(view.source, events)
    timeline = _Timeline.of(views, events, keys, as_of_us)
    columns: dict[str, FloatArray] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # sums beyond 1e308 are infinite, silently
        for each in views:
            found = timeline.features(each, request)
            columns.update({f"{each.prefix}__{name}": values for name, values in found.items()})
    return columns


def needed_columns(views: Sequence[FeatureView]) -> tuple[str, ...]:
    """The columns of a source that views look at, keys and event time included, in the schema's order.

    Args:
        views: All of the same source and entity.
    """
    source = views[0].source
    needed = {source.event_time, *(column for view in views for column in view.entity.key_columns)}
    needed.update(
        columns_read([each for view in views for each in (*view.inputs, Input(None, view.where))], source.schema)
    )
    return tuple(column for column in source.schema.names if column in needed)


def columns_read(inputs: Iterable[Input], schema: pa.Schema) -> tuple[str, ...]:
    """The columns that inputs name, by themselves or in expressions, in the schema's order."""
    distinct = {each.key: each for each in inputs}
    rests = {column: schema.remove(schema.get_field_index(column)) for column in schema.names}
    return tuple(column for column, rest in rests.items() if not all(_fits(each, rest) for each in distinct.values()))


def _fits(given: Input, schema: pa.Schema) -> bool:
    try:
        check_input(given, schema, at="")
    except DefinitionError:
        return False
    return True


def earliest_us(views: Sequence[FeatureView], as_of_us: IntArray) -> int | None:
    """The first instant that any window of any row can see; None if a view looks at all of the past.

    Args:
        views: Any.
        as_of_us: Query instants, shape ``(m,)`` with ``m ≥ 1``.
    """
    if any(view.has_lifetime for view in views):
        return None
    edges = (
        lower_edge_us(as_of_us.min(keepdims=True), window_us, hop_us)
        for view in views
        for window_us, hop_us in {(each.window_us, each.hop_us) for each in view.base_features.values()}
        if window_us is not None and hop_us is not None
    )
    return int(min(edges)[0])


def unique_events(source: EventSource, events: pa.Table) -> pa.Table:
    """Drop repeated event ids; the first ingested stays, and without ingestion times the first row.

    Args:
        source: Names the id column.
        events: Has the id column, and ``_ingested_us`` if known.
    """
    ids = events.column(source.event_id).combine_chunks().dictionary_encode()
    if len(ids.dictionary) == events.num_rows:
        return events
    codes = ids.indices.to_numpy(zero_copy_only=False)
    rows = np.arange(len(codes))
    if INGESTED in events.column_names:
        rows = np.argsort(times_us(events.column(INGESTED)), kind="stable")
    _, first = np.unique(codes[rows], return_index=True)
    return events.take(pa.array(np.sort(rows[first])))


def _known(events: pa.Table, known_at_us: int | None) -> pa.Table:
    if known_at_us is None:
        return events
    if INGESTED not in events.column_names:
        raise InvalidValueError(
            "known_at", str(known_at_us), f"events with the column {INGESTED}, as the event log has them"
        )
    return events.filter(pc.less_equal(events.column(INGESTED).cast(pa.int64()), known_at_us))


@dataclass(frozen=True)
class _Edge:
    """One event of each row's window; shape ``(m,)`` each.

    Attributes:
        position: Its place in order; any where there is none.
        found: Whether there is one.
        event: Its place among the events that were given, by the caller's order of rows; any where there is none.
        missing: The rows without one, in the caller's order: their places.
    """

    position: IntArray
    found: NDArray[np.bool_]
    event: IntArray
    missing: IntArray


@dataclass
class _Timeline:
    """Events in (entity, event time, tie) order and the rows that ask about them.

    Rows are answered in the same order, so that look-ups walk memory forwards; `features` puts
    them back.

    Attributes:
        codes: Entity of each event, shape ``(n,)``, ascending.
        times: Event times, shape ``(n,)``.
        order: Where each event was among those given, shape ``(n,)``.
        inputs: What the views look at.
        index: Finds positions of events.
        row_codes: Entity of each row, shape ``(m,)``.
        as_of_us: Query instants, shape ``(m,)``.
        rows: Where each row belongs in the caller's order.
    """

    codes: IntArray
    times: IntArray
    order: IntArray
    inputs: Mapping[str, OrderedInput]
    index: EventIndex
    row_codes: IntArray
    as_of_us: IntArray
    rows: IntArray
    _ranges: dict[tuple[int, int] | None, Ranges] = field(default_factory=dict)
    _tiles: dict[int, Tiles] = field(default_factory=dict)
    _edges: dict[tuple[int, bool, int | None], _Edge] = field(default_factory=dict)
    _merged: dict[tuple[str, int | None, int], FloatArray] = field(default_factory=dict)
    _running: dict[tuple[str, int], Parts] = field(default_factory=dict)

    @classmethod
    def of(cls, views: Sequence[FeatureView], events: pa.Table, keys: pa.Array, as_of_us: IntArray) -> _Timeline:
        """Order events and rows; events that no row can see are dropped first."""
        source, entity = views[0].source, views[0].entity
        asked = EntityCodes(keys)
        event_codes = _event_codes(source, entity, events, asked)
        times = times_us(events.column(source.event_time))
        if len(as_of_us):
            seen = (event_codes >= 0) & (times < as_of_us.max())
            since_us = earliest_us(views, as_of_us)
            if since_us is not None:
                seen &= times >= since_us
        else:
            seen = np.zeros(len(times), dtype=np.bool_)
        kept: IntArray | None = None if seen.all() else np.flatnonzero(seen)
        if kept is not None and len(kept) and kept[-1] - kept[0] + 1 == len(kept):
            span = slice(kept[0], kept[-1] + 1)  # as where a file in order of time has more of it than was asked for
            events, event_codes, times = events.slice(span.start, len(kept)), event_codes[span], times[span]
            kept = None
        elif kept is not None and 2 * len(kept) < len(seen):
            events, event_codes, times = events.take(pa.array(kept)), event_codes[kept], times[kept]
            kept = None
        ties = (
            times_us(events.column(TIE))
            if TIE in events.column_names
            else tie48(hash64(events.column(source.event_id)))
        )
        alive = [Input(None, view.where) for view in views if view.ttl_us is not None]
        wanted = {each.key: each for each in (*(each for view in views for each in view.inputs), *alive)}
        given = evaluate(events, wanted.values())
        if kept is None:
            index = EventIndex(event_codes, times, ties, n_codes=asked.n)
            order = index.order
        else:
            index = EventIndex(event_codes[kept], times[kept], ties[kept], n_codes=asked.n)
            order = kept[index.order]
        inputs = {key: OrderedInput(each, order) for key, each in given.items()}
        rows = np.argsort(index.packed(asked.rows, as_of_us))
        return cls(index.codes, index.times, order, inputs, index, asked.rows[rows], as_of_us[rows], rows)

    def features(self, view: FeatureView, request: Mapping[str, FloatArray] | None) -> dict[str, FloatArray]:
        """All features of a view that can be computed, by name, in the caller's order of rows."""
        expired = self._expired(view)
        columns: dict[str, FloatArray] = {}
        for name, aggregation in view.base_features.items():
            states = aggregation.states()
            if states[0].op in ("first", "last") and not isinstance(aggregation, Quantile):
                hop_us = aggregation.hop_us or US_PER_DAY
                columns[name] = self._values_at_edge(states[0], aggregation.window_us, hop_us, expired)
                continue
            column = np.empty(len(self.rows))
            column[self.rows] = self._value(aggregation, expired)
            columns[name] = column
        view.derive(columns, request=request)
        return columns

    def _value(self, aggregation: Aggregation, expired: NDArray[np.bool_] | None) -> FloatArray:
        """A feature of each row, nothing's where the view's ttl has ended."""
        hop_us = aggregation.hop_us or US_PER_DAY
        states = aggregation.states()
        if isinstance(aggregation, Quantile):
            values = self._quantile(aggregation, hop_us)
            return values if expired is None else np.where(expired, np.nan, values)
        parts = [self._state(state, aggregation.window_us, hop_us) for state in states]
        if expired is not None:
            parts = [emptied(state, part, expired) for part, state in zip(parts, states, strict=True)]
        return aggregation.finalize(parts, as_of_us=self.as_of_us)

    def _values_at_edge(
        self, state: State, window_us: int | None, hop_us: int, expired: NDArray[np.bool_] | None
    ) -> FloatArray:
        """The first or last value of each window, looked up where the events were given; in the caller's order."""
        given = self.inputs[state.source.key]
        if not len(self.times):
            return np.full(len(self.rows), np.nan)
        edge = self._edge_of(given, self._range(window_us, hop_us), first=state.op == "first")
        values: FloatArray = given.given.values[edge.event]
        values += 0.0  # no -0.0
        values[edge.missing] = np.nan
        if expired is not None:
            values[self.rows[expired]] = np.nan
        return values

    def _quantile(self, aggregation: Quantile, hop_us: int) -> FloatArray:
        """A row's quantile, without a row of bins."""
        ranges, given, bins = (
            self._range(aggregation.window_us, hop_us),
            self.inputs[aggregation.input.key],
            aggregation.bins,
        )
        used = np.concatenate([[0], np.cumsum(given.used)])
        low = used[ranges.low]
        among = Ranges(low, np.maximum(low, used[ranges.high]))
        total = (among.high - among.low).astype(np.float64)
        nth = rank(total, aggregation.q).astype(np.int64)
        found = nth_smallest(bins.of(given.values[given.used]), among, nth, n_values=bins.width)
        return np.where(total > 0, bins.values[np.where(total > 0, found, 0)], np.nan)

    def _expired(self, view: FeatureView) -> NDArray[np.bool_] | None:
        """Rows whose last event is older than the view's ttl; None if it has no ttl."""
        if view.ttl_us is None:
            return None
        last = self._state(State("max", "time", Input(None, view.where)), None, US_PER_DAY)
        return ~(self.as_of_us - last <= view.ttl_us)

    def _state(self, state: State, window_us: int | None, hop_us: int) -> FloatArray:
        """A state, merged over each row's window: shape ``(m,)``, or ``(m, width)`` of a wider one."""
        key = (state.key, window_us, hop_us)
        if key not in self._merged:
            ranges = self._range(window_us, hop_us)
            given = self.inputs[state.source.key]
            match state.op, state.of, state.merge_across:
                case "add", "one", "add":
                    merged = counted(given.used, ranges)
                case "max", "one", "add":
                    merged = tiles_with(self._tile(hop_us), given.used, ranges)
                case "max" | "min", "time", _:
                    merged = self._time_at_edge(given, ranges, first=state.op == "min")
                case _:
                    merged = self._folded(state, given, ranges, window_us, hop_us)
            self._merged[key] = merged
        return self._merged[key]

    @cached_property
    def _high(self) -> IntArray:
        return self.index.positions(self.row_codes, self.as_of_us)

    def _range(self, window_us: int | None, hop_us: int) -> Ranges:
        key = None if window_us is None else (window_us, hop_us)
        if key not in self._ranges:
            low = (
                self.index.begins[self.row_codes]
                if window_us is None
                else self.index.positions(self.row_codes, lower_edge_us(self.as_of_us, window_us, hop_us))
            )
            self._ranges[key] = Ranges(low, self._high)
        return self._ranges[key]

    def _tile(self, hop_us: int) -> Tiles:
        if hop_us not in self._tiles:
            self._tiles[hop_us] = Tiles(self.codes, self.times, hop_us)
        return self._tiles[hop_us]

    def _edge_of(self, given: OrderedInput, ranges: Ranges, *, first: bool) -> _Edge:
        """The first or last usable event of each window; inputs that use every event share it."""
        key = (id(ranges), first, None if given.uses_every else id(given))
        if key not in self._edges:
            position, found = edges(given.used, ranges, first=first)
            event = np.empty(len(position), dtype=np.int64)
            event[self.rows] = self.order[position] if len(self.times) else 0
            self._edges[key] = _Edge(position, found, event, self.rows[~found])
        return self._edges[key]

    def _time_at_edge(self, given: OrderedInput, ranges: Ranges, *, first: bool) -> FloatArray:
        """The time of the first or last usable event of each window; infinite where there is none."""
        nothing = np.inf if first else -np.inf
        edge = self._edge_of(given, ranges, first=first)
        if not len(self.times):
            return np.full(len(edge.found), nothing)
        return np.where(edge.found, self.times[edge.position], nothing)

    def _folded(
        self, state: State, given: OrderedInput, ranges: Ranges, window_us: int | None, hop_us: int
    ) -> FloatArray:
        """Merge what has no shorter way: tile by tile, each window from two blocks of tiles."""
        fold = FOLDS[state.op]
        result = (
            np.tile(state.empty, (len(ranges.low), 1)) if state.width > 1 else np.full(len(ranges.low), *state.empty)
        )
        some = np.flatnonzero(~ranges.empty)
        if not len(some):
            return result
        tiles = self._tile(hop_us)
        blocks = tiles.blocks(None if window_us is None else window_us // hop_us)
        inside = self._running_of(state, given, hop_us)
        totals = inside[tiles.events.ends - 1]
        forward = fold.running(blocks.tiles, totals, False)

        last_event = ranges.high[some] - 1
        last = tiles.of_event[last_event]
        merged = fold.merge(fold.unless(blocks.opens[last], forward[last - 1]), inside[last_event])
        if window_us is not None:
            backward = fold.running(blocks.tiles, totals, True)
            first = tiles.of_event[ranges.low[some]]
            lowest = lower_edge_us(self.as_of_us[some], window_us, hop_us) // window_us
            tail = fold.unless(blocks.number[first] != lowest, backward[first])
            merged = fold.chosen(blocks.number[last] == lowest, tail, fold.merge(tail, merged))
        result[some] = merged
        return result

    def _running_of(self, state: State, given: OrderedInput, hop_us: int) -> Parts:
        key = (state.key, hop_us)
        if key not in self._running:
            fold = FOLDS[state.op]
            self._running[key] = fold.running(self._tile(hop_us).events, fold.of(given.values, given.used), False)
        return self._running[key]


def _event_codes(source: EventSource, entity: Entity, events: pa.Table, asked: EntityCodes) -> IntArray:
    """The number of each event's entity among those asked for; -1 where it isn't."""
    what = f"events of {source.name!r}"
    column = entity.key_columns[0]
    if len(entity.key_columns) > 1 or not pa.types.is_dictionary(events.schema.field(column).type):
        return asked.of(entity.encode(events, what=what))
    whole = events.column(column).unify_dictionaries().combine_chunks()
    codes = asked.of(entity.encode(pa.table({column: whole.dictionary}), what=what))
    places: IntArray = codes[whole.indices.to_numpy()]
    return places
