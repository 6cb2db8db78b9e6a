"""Feast, as its users run it: the peer of `online_read.py`, `feast_join.py` and `materialization.py`.

    python feast_store.py --folder /tmp/repository --redis 127.0.0.1:6379

It imports nothing of Heliostat and runs in an environment of its own. Each line of standard input is
a JSON object that names something to ``do``, with what that takes; it answers with a line. Settings
are Feast's defaults: the offline store reads files with Dask, the engine is the local one, and the
registry is a file that stays in memory once it has been read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ENTITY, KEY, TIME = "user", "user_id", "event_timestamp"


class Repository:
    """A Feast repository of one entity with views on Parquet files.

    Args:
        folder: For its registry.
        redis: ``host:port`` of the online store.
    """

    def __init__(self, folder: Path, redis: str) -> None:
        import feast
        from feast.repo_config import RegistryConfig

        self.version = feast.__version__
        self.store = feast.FeatureStore(
            config=feast.RepoConfig(
                project="bench",
                provider="local",
                registry=RegistryConfig(path=str(folder / "registry.db"), cache_ttl_seconds=0),  # 0: for ever
                online_store={"type": "redis", "connection_string": redis},
                offline_store={"type": "file"},
                entity_key_serialization_version=3,
            )
        )

    def apply(self, views: dict[str, dict[str, Any]]) -> dict[str, object]:
        """Declare views by name: the Parquet ``file`` and the names of its ``features``, all float64."""
        from feast import Entity, FeatureView, Field, FileSource, ValueType
        from feast.types import Float64

        user = Entity(name=ENTITY, join_keys=[KEY], value_type=ValueType.INT64)
        declared = [
            FeatureView(
                name=name,
                entities=[user],
                ttl=timedelta(0),  # never
                schema=[Field(name=feature, dtype=Float64) for feature in view["features"]],
                source=FileSource(name=f"{name}_source", path=str(view["file"]), timestamp_field=TIME),
            )
            for name, view in views.items()
        ]
        self.store.apply([user, *declared])
        return {"views": list(views)}

    def materialize(self, start: str, end: str, views: list[str]) -> dict[str, object]:
        """Bring views' newest rows into the online store."""
        first, last = (datetime.fromisoformat(each).astimezone(UTC) for each in (start, end))
        began = time.perf_counter()
        self.store.materialize(first, last, feature_views=views)
        return {"seconds": time.perf_counter() - began}

    def values(self, features: list[str], ids: list[int], *, full_names: bool) -> dict[str, object]:
        """What the online store has, by the feature's name."""
        rows = [{KEY: each} for each in ids]
        found = self.store.get_online_features(features=features, entity_rows=rows, full_feature_names=full_names)
        return {"values": found.to_dict()}

    def read(
        self, features: list[str], batches: list[list[int]], seconds: float, *, to_dict: bool
    ) -> dict[str, object]:
        """Read online again and again, the batches of ids in turn; says how long each read took, in ms."""
        names = len({each.partition(":")[2] for each in features}) < len(features)  # or Feast refuses
        get = self.store.get_online_features
        rows = [[{KEY: each} for each in batch] for batch in batches]
        taken, at, clock = [], 0, time.perf_counter
        ends = clock() + seconds
        while (began := clock()) < ends:
            found = get(features=features, entity_rows=rows[at % len(rows)], full_feature_names=names)
            if to_dict:
                found.to_dict()
            taken.append((clock() - began) * 1e3)
            at += 1
        return {"ms": taken}

    def join(self, spine: str, features: list[str], out: str) -> dict[str, object]:
        """Historical features of a spine's file (id, event_timestamp, row) into another; and frame to frame."""
        import pandas as pd
        import pytz

        began = time.perf_counter()
        frame = pd.read_parquet(spine)
        # Any other object for UTC, pandas' own too, sends Feast through a slower, row by row conversion.
        frame[TIME] = frame[TIME].dt.tz_convert(pytz.UTC)
        given = time.perf_counter()
        joined = self.store.get_historical_features(entity_df=frame, features=features).to_df()
        answered = time.perf_counter()
        joined.to_parquet(out)
        return {"seconds": time.perf_counter() - began, "frames": answered - given}


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--redis", default="127.0.0.1:6379", help="the online store, if it is used")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    repository = Repository(given.folder, given.redis)
    print(json.dumps({"version": repository.version}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        work = getattr(repository, asked.pop("do"))
        told = io.StringIO()  # Feast talks of its progress where answers belong
        with contextlib.redirect_stdout(told):
            answer = work(**asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
