"""The CDNOW purchase log, from the package that ships it to a Parquet file with event ids."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.errors import MissingFileError

PACKAGE = "lifetimes"
FILE = "lifetimes/datasets/CDNOW_master.txt"


def raw_file() -> Path:
    """Where the installed package keeps the log; the package itself is never imported.

    Raises:
        MissingFileError: If the package isn't installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for each in files:
        if str(each) == FILE:
            return Path(str(each.locate()))
    raise MissingFileError(FILE, "install the demo extra: pip install 'heliostat[demo]'")


def write_parquet(target: Path) -> int:
    """Write the log as Parquet; the row number is the event id, so repeated rows stay separate purchases.

    Returns:
        Number of purchases: 69,659.
    """
    columns = ["customer_id", "date", "quantity", "amount"]
    frame = pd.read_csv(raw_file(), sep=r"\s+", skiprows=1, header=None, names=columns)
    table = pa.table(
        {
            "event_id": pa.array(np.arange(1, len(frame) + 1)),
            "customer_id": pa.array(frame["customer_id"].to_numpy()),
            "purchased_at": pa.array(
                pd.to_datetime(frame["date"].astype(str), format="%Y%m%d", utc=True).dt.as_unit("us")
            ),
            "quantity": pa.array(frame["quantity"].to_numpy()),
            "amount": pa.array(frame["amount"].to_numpy()),
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return int(table.num_rows)


if __name__ == "__main__":
    sys.stdout.write(f"{write_parquet(Path(sys.argv[1]))} purchases\n")
