"""The dictionary of categories: which text a code stands for. Append-only, in the catalog.

No feature is computed from it. A code is a function of its text (`heliostat.schema.text_codes`), so that the
offline kernel, the rings and a replica that has just started agree on it without asking anybody; a
dictionary that had to be looked up would be one more thing that one engine knows before the other.
It serves people, who want to read texts, and it is where a collision is found: two texts of one
column with the same 48 bits, one chance in 500 among a million texts. The second one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.clock import Clock
from heliostat.errors import CategoryCollisionError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import FeatureView
from heliostat.schema import text_codes
from heliostat.storage.catalog import Catalog
from heliostat.storage.event_log import EventLog


class CategoryDictionary:
    """Learns texts as events come in, and tells them again. Threads may share one.

    Args:
        open_catalog: Gives the catalog that keeps it; not called before there is something to learn or to tell.
        views: Whose categorical features it is about.
        clock: Tells when a text was first seen.
    """

    def __init__(self, open_catalog: Callable[[], Catalog], views: Iterable[FeatureView], clock: Clock) -> None:
        self._open_catalog, self._clock = open_catalog, clock
        self.columns: dict[str, tuple[str, ...]] = {}
        for view in views:
            known = self.columns.get(view.source.name, ())
            own = [str(view.base_features[name].column) for name in view.categorical]
            self.columns[view.source.name] = tuple(dict.fromkeys((*known, *own)))
        self._texts: dict[tuple[str, str], dict[int, str]] = {}

    def unknown(self, source: str, events: pa.Table) -> dict[str, dict[int, str]]:
        """What events hold that this process hasn't seen yet: text by code, by column.

        Args:
            source: The source's name.
            events: With columns of the source.

        Raises:
            CategoryCollisionError: If a text has the code of another.
        """
        new: dict[str, dict[int, str]] = {}
        for column in (each for each in self.columns.get(source, ()) if each in events.column_names):
            distinct = pc.unique(events.column(column)).drop_null()
            held = self._texts.setdefault((source, column), {})
            found: dict[int, str] = {}
            for code, text in zip(text_codes(distinct).astype(np.int64).tolist(), distinct.to_pylist(), strict=True):
                other = held.get(code, found.get(code))
                if other is None:
                    found[code] = text
                elif other != text:
                    raise CategoryCollisionError(f"{source}.{column}", text, other, code)
            if found:
                new[column] = found
        return new

    def learn(self, source: str, new: Mapping[str, Mapping[int, str]]) -> int:
        """Add what the catalog doesn't know yet, in one transaction.

        Args:
            source: The source's name.
            new: As `unknown` gives it.

        Returns:
            How many texts were added.

        Raises:
            CategoryCollisionError: If a text has the code of another; nothing is added then.
            CatalogUnavailableError: If the catalog doesn't answer.
        """
        if not new:
            return 0
        added = 0
        with self._open_catalog().write() as rows:
            for column, texts in new.items():
                stored = rows.categories(source, column, texts)
                for code, other in stored.items():
                    if texts[code] != other:
                        raise CategoryCollisionError(f"{source}.{column}", texts[code], other, code)
                missing = {code: text for code, text in texts.items() if code not in stored}
                if missing:
                    rows.add_categories(source, column, missing, at_us=self._clock.now_us())
                    added += len(missing)
        for column, texts in new.items():
            self._texts.setdefault((source, column), {}).update(texts)
        return added

    def catch_up(self, event_log: EventLog, view: FeatureView) -> int:
        """Learn the texts of a view that was declared after its events came in; nothing to do for others.

        Args:
            event_log: Read for columns that the dictionary says nothing of, a bucket at a time.
            view: The view.

        Returns:
            How many texts were added.

        Raises:
            CategoryCollisionError: If two texts of a column have one code.
            StorageError: If the log can't be read, or the catalog doesn't answer.
        """
        columns = {str(view.base_features[name].column) for name in view.categorical}
        if not columns:
            return 0
        with self._open_catalog().read() as rows:
            missing = sorted(column for column in columns if not rows.has_categories(view.source.name, column))
        added = 0
        for bucket in range(event_log.n_buckets) if missing else ():
            events = event_log.read_bucket(view.source, view.entity, bucket, columns=missing)
            new = self.unknown(view.source.name, events)
            added += self.learn(view.source.name, {column: new[column] for column in missing if column in new})
        return added

    def texts(self, view: FeatureView, feature: str, codes: FloatArray) -> list[str | None]:
        """The texts of a categorical feature's values.

        Args:
            view: The view.
            feature: Its categorical feature.
            codes: Shape ``(n,)``; NaN is null.

        Returns:
            ``n`` texts; None for null, and for a code that nobody has written down.

        Raises:
            CatalogUnavailableError: If the catalog doesn't answer.
        """
        column = str(view.base_features[feature].column)
        held = self._texts.setdefault((view.source.name, column), {})
        asked = {int(code) for code in codes[np.isfinite(codes)].tolist()}
        unseen = asked - set(held)
        if unseen:
            with self._open_catalog().read() as rows:
                held.update(rows.categories(view.source.name, column, sorted(unseen)))
        return [held.get(int(code)) if np.isfinite(code) else None for code in codes.tolist()]
