"""One view of a feature read: what is computed of its rings, and in which columns of a matrix it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import RingCorruptError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import FeatureView
from heliostat.online.compiled import MergeProgram, can_run, rings_of
from heliostat.online.merging import MergePlan, merge_rings, parse_rings
from heliostat.online.tiles import BoolArray, RingGroup, RingLayout, Rings

Given: TypeAlias = tuple[slice | NDArray[np.intp], FloatArray]
"""Which rows of a column are given, and their values."""

Inputs: TypeAlias = Mapping[str, FloatArray]
"""What a request brings for derived features, shape ``(n,)`` by name; NaN is null."""


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """What is read and computed of one view.

    The program writes into the matrix itself; only derived features, and those that it has no word for, are made as
    columns first.

    Attributes:
        view: The view.
        bundle: Which of an entity's bundles has the view's rings.
        merge: Its rings, and the aggregated features that are needed, themselves or by derived ones.
        program: Computes most of them; None if none.
        rest: What of ``merge`` the program doesn't do; None if it does all.
        derived: Derived features that are needed, in declared order.
        places: Where the program's features come: columns of the matrix, or a scratch column behind them.
        others: The other features that were asked for, and their columns.
        n_scratch: How many scratch columns there are.
    """

    view: FeatureView
    bundle: int
    merge: MergePlan
    program: MergeProgram | None
    rest: MergePlan | None
    derived: tuple[str, ...]
    places: Mapping[str, tuple[int, ...]]
    others: tuple[tuple[str, int], ...]
    n_scratch: int

    @classmethod
    def of(
        cls, view: FeatureView, asked: Sequence[tuple[str, int]], layout: RingLayout, *, bundle: int, scratch: int
    ) -> Self:
        """How to read some features.

        Args:
            view: Theirs.
            asked: Their names, and the columns in which they are wanted.
            layout: Of the view's rings.
            bundle: Which of an entity's bundles has them.
            scratch: The first column that may be used for what nobody asked for.
        """
        needed = view.needed({name for name, _ in asked})
        # Whether a view is absent is seen by its rings: features of the request alone still read one.
        stored = [name for name in needed if name in view.base_features] or list(view.base_features)[:1]
        quick = [name for name in stored if can_run(view.base_features[name])]
        rest = [name for name in stored if name not in quick]
        places: dict[str, tuple[int, ...]] = {}
        n_scratch = 0
        for name in quick:
            places[name] = tuple(column for each, column in asked if each == name)
            if not places[name]:
                places[name] = (scratch + n_scratch,)
                n_scratch += 1
        merge = MergePlan(layout, stored)
        written = [(name, column) for name, columns in places.items() for column in columns]
        return cls(
            view,
            bundle,
            merge,
            MergeProgram(merge, written) if quick else None,
            MergePlan(layout, rest) if rest else None,
            tuple(name for name in needed if name in view.derived_features),
            places,
            tuple((name, column) for name, column in asked if name not in places),
            n_scratch,
        )

    @property
    def direct(self) -> bool:
        """Whether the program does all of it."""
        return self.rest is None and not self.derived

    @cached_property
    def _read(self) -> tuple[str, ...]:
        """What derived features take of the program's."""
        taken = {name for each in self.derived for name in self.view.derived_features[each].inputs}
        return tuple(name for name in self.places if name in taken)

    def fill(
        self,
        wide: FloatArray,
        values: Sequence[bytes | None],
        as_of_us: int,
        *,
        given: Mapping[str, Given],
        inputs: Inputs,
        newest_us: FloatArray,
        absent: BoolArray,
        position: int,
    ) -> None:
        """Compute the features of ``n`` entities.

        Args:
            wide: Takes them, shape ``(n, …)``: the columns that were asked for, and scratch columns.
            values: Bundles, as the store gives them; ``n`` of each source and entity.
            as_of_us: Now: later than every event in the rings.
            given: Features that a request gives itself.
            inputs: What it brings for derived features.
            newest_us: Shape ``(n,)``; takes where the newest tile begins, if that is later, or NaN is there.
            absent: Shape ``(n, n_views)``; takes whether the store has nothing of the view.
            position: In which column.

        Raises:
            RingCorruptError: If a value isn't a bundle, or what is in it no ring.
        """
        n = len(wide)
        if self.program is not None:
            self._run(self.program, wide, values, as_of_us, newest_us, absent, position)
            for name in given.keys() & self.places.keys():
                rows, numbers = given[name]
                for column in self.places[name]:
                    wide[rows, column] = numbers
        if self.direct:
            return
        # Contiguous, as everywhere else: of a column with gaps a function might give other bits.
        columns = {**inputs, **{name: wide[:, self.places[name][0]].copy() for name in self._read}}
        if self.rest is not None:
            rings = {group.label: _parsed(group, self._own(values, n)) for group in self.rest.groups}
            merged = merge_rings(self.rest, rings, as_of_us=as_of_us)
            columns.update((name, _replaced(merged.columns[name], given.get(name))) for name in self.rest.features)
            if self.program is None:
                absent[:, position] = sum(each.counts for each in rings.values()) == 0
                longest = self.rest.groups[-1]
                _newest(longest, rings[longest.label], newest_us)
                if merged.expired is not None:
                    absent[:, position] |= merged.expired
        for name in self.derived:
            columns[name] = _replaced(self.view.derived_features[name](columns), given.get(name))
        for name, column in self.others:
            wide[:, column] = columns[name]

    def _run(
        self,
        program: MergeProgram,
        out: FloatArray,
        values: Sequence[bytes | None],
        as_of_us: int,
        newest_us: FloatArray,
        absent: BoolArray,
        position: int,
    ) -> None:
        n = len(out)
        try:
            program.run(values, self.bundle * n, as_of_us, out=out, newest_us=newest_us, absent=absent, view=position)
        except ValueError:
            for group in self.merge.groups:
                _parsed(group, self._own(values, n))
            raise

    def _own(self, values: Sequence[bytes | None], n: int) -> Sequence[bytes | None]:
        return values[self.bundle * n : (self.bundle + 1) * n]


def _parsed(group: RingGroup, bundles: Sequence[bytes | None]) -> Rings:
    """One ring of each bundle."""
    try:
        rings = rings_of(bundles, group.ring_id)
    except ValueError:
        lengths = tuple(sorted({len(each) for each in bundles if each}))
        raise RingCorruptError(group.view_ref, group.name, lengths) from None
    try:
        return parse_rings(group, rings)
    except ValueError:
        lengths = tuple(sorted({len(each) for each in rings if each}))
        raise RingCorruptError(group.view_ref, group.name, lengths, group.slot_bytes) from None


def _newest(group: RingGroup, rings: Rings, newest_us: FloatArray) -> None:
    """Write down where each entity's newest tile begins, if it has one: its last slot, unless that is the base."""
    if len(rings.slots):
        # The fraction of a slot's number says where it comes from.
        last = np.floor(rings.slots[np.add.accumulate(rings.counts) - 1, 0])
        np.fmax(newest_us, last * group.hop_us, out=newest_us, where=rings.counts > group.life)


def _replaced(column: FloatArray, given: Given | None) -> FloatArray:
    if given is None:
        return column
    rows, values = given
    column = column.copy()  # may be a state that other features share
    column[rows] = values
    return column
