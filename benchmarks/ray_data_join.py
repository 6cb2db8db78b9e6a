"""The point-in-time join by Ray Data's own group-by: a peer of `benchmarks/point_in_time.py`.

As somebody would write it who knows Ray Data: only the columns needed travel, weights are looked up
before the shuffle, a group is a shard of many users, so that pandas works on whole columns, and
the number of partitions is given.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray

from benchmarks import activities
from heliostat.clock import US_PER_DAY

_SHARDS = 32


def join(events_file: Path, spine_file: Path, result: Path, n_partitions: int) -> None:
    """Group events and spine rows by a shard of the user, and merge each shard's in pandas.

    Args:
        events_file: Parquet.
        spine_file: Parquet.
        result: A folder for Parquet files; what is there is removed.
        n_partitions: Of the shuffle.
    """
    columns = ["user_id", "happened_at", "type", "session_duration"]
    events = ray.data.read_parquet(str(events_file), columns=columns).map_batches(
        _event_rows, batch_format="pyarrow", batch_size=None, fn_kwargs={"n_shards": _SHARDS}
    )
    spine = ray.data.read_parquet(str(spine_file)).map_batches(
        _spine_rows, batch_format="pyarrow", batch_size=None, fn_kwargs={"n_shards": _SHARDS}
    )
    shutil.rmtree(result, ignore_errors=True)
    grouped = events.union(spine).groupby("shard", num_partitions=n_partitions)
    grouped.map_groups(_join_shard, batch_format="pandas").write_parquet(str(result))


def _event_rows(block: pa.Table, n_shards: int) -> pa.Table:
    kinds, weights = pa.array(activities.WEIGHTS), pa.array(activities.WEIGHTS.values())
    users = block.column("user_id").to_numpy()
    return pa.table(
        {
            "shard": pa.array(users % n_shards),
            "row": pa.nulls(block.num_rows, pa.int64()),
            "user_id": block.column("user_id"),
            "t": block.column("happened_at").cast(pa.int64()),
            "duration": block.column("session_duration"),
            "weight": weights.take(pc.index_in(block.column("type"), value_set=kinds).combine_chunks()),
        }
    )


def _spine_rows(block: pa.Table, n_shards: int) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array(block.column("user_id").to_numpy() % n_shards),
            "row": block.column("row"),
            "user_id": block.column("user_id"),
            "t": block.column("as_of").cast(pa.int64()),
            "duration": pa.nulls(block.num_rows, pa.float64()),
            "weight": pa.nulls(block.num_rows, pa.float64()),
        }
    )


def _join_shard(group: pd.DataFrame) -> pd.DataFrame:
    # Plain numpy columns: what comes out of Ray Data is backed by Arrow, and merges more slowly.
    is_event = group["row"].isna().to_numpy(dtype=bool)
    own, others = group[~is_event], group[is_event]
    rows = pd.DataFrame(
        {"row": _integers(own["row"]), "user_id": _integers(own["user_id"]), "q": _integers(own["t"])}
    )
    events = pd.DataFrame(
        {
            "user_id": _integers(others["user_id"]),
            "t": _integers(others["t"]),
            "duration": others["duration"].to_numpy(dtype=np.float64, na_value=np.nan),
            "weight": others["weight"].to_numpy(dtype=np.float64, na_value=np.nan),
        }
    )
    pairs = rows.merge(events, on="user_id")
    low = (pairs["q"] // US_PER_DAY - activities.WINDOW_DAYS) * US_PER_DAY
    pairs = pairs[(pairs["t"] < pairs["q"]) & (pairs["t"] >= low)]
    pairs = pairs.assign(day=pairs["t"] // US_PER_DAY)
    found = pairs.groupby("row").agg(
        activity_count=("t", "size"),
        avg_session_duration=("duration", "mean"),
        last=("t", "max"),
        active_days=("day", "nunique"),
        weight=("weight", "sum"),
    )
    result = rows.set_index("row").join(found).reset_index()
    return pd.DataFrame(
        {
            "row": result["row"].astype("int64"),
            "activity_count": result["activity_count"].fillna(0).astype("int64"),
            "avg_session_duration": result["avg_session_duration"].astype("float64"),
            "days_since_last": (result["q"] - result["last"]).astype("float64") / US_PER_DAY,
            "active_days": result["active_days"].astype("float64"),
            "activity_score": np.log1p(result["weight"].fillna(0.0).astype("float64")),
        }
    )


def _integers(column: pd.Series) -> NDArray[np.int64]:
    return column.to_numpy(dtype=np.int64)
