"""The point-in-time join in DuckDB, in several formulations: the peer of `benchmarks/point_in_time.py`.

    python duckdb_join.py --threads 2

It imports nothing of Heliostat and runs in an environment of its own. Each line of standard input is
a JSON object that names a formulation and files; it answers with a line: how many seconds the query
took, from Parquet files to a Parquet file. The connection stays open: all but the first run are warm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

# A window of 30 days begins at the start of a day, as one that is kept in daily tiles does.
VIEWS = """
    CREATE OR REPLACE MACRO day_us() AS 86_400_000_000;
    CREATE OR REPLACE MACRO day_of(t) AS t // day_us();

    CREATE OR REPLACE TEMP VIEW s AS
    SELECT row, user_id, epoch_us(as_of) AS q, day_of(q) AS q_day, (q_day - 30) * day_us() AS lo
    FROM read_parquet('{spine}');

    CREATE OR REPLACE TEMP VIEW e AS
    SELECT user_id, epoch_us(happened_at) AS t, day_of(t) AS t_day, session_duration AS d,
           CASE type WHEN 'login' THEN 1.0::DOUBLE WHEN 'purchase' THEN 5.0::DOUBLE
                     WHEN 'share' THEN 3.0::DOUBLE ELSE 0.5::DOUBLE END AS w
    FROM read_parquet('{events}');"""

QUERIES = {
    # As one would first write it.
    "range join": """
        SELECT row, count(t) AS activity_count, avg(d) AS avg_session_duration,
               (any_value(q) - max(t)) / day_us()::DOUBLE AS days_since_last,
               nullif(count(DISTINCT t_day), 0) AS active_days, ln(1 + coalesce(sum(w), 0)) AS activity_score
        FROM s LEFT JOIN e ON s.user_id = e.user_id AND t >= lo AND t < q
        GROUP BY row""",
    # Distinct days as bits of a 64-bit word: no set of days for each row.
    "range join, days as bits": """
        SELECT row, count(t) AS activity_count, avg(d) AS avg_session_duration,
               (any_value(q) - max(t)) / day_us()::DOUBLE AS days_since_last,
               nullif(bit_count(bit_or(day_bit)), 0) AS active_days, ln(1 + coalesce(sum(w), 0)) AS activity_score
        FROM s LEFT JOIN (SELECT *, 1::UBIGINT << (t_day % 62)::UTINYINT AS day_bit FROM e) AS e
        ON s.user_id = e.user_id AND t >= lo AND t < q
        GROUP BY row""",
    # Whole days are added up once for each user; only the last, broken day is joined by event.
    "range join of daily totals": """
        WITH events AS MATERIALIZED (SELECT * FROM e),
        daily AS (
            SELECT user_id, t_day, count(*) AS n, sum(d) AS d_sum, count(d) AS d_n, sum(w) AS w, max(t) AS last
            FROM events GROUP BY user_id, t_day),
        parts AS (
            SELECT row, n, d_sum, d_n, w, last, 1 AS whole_days
            FROM s JOIN daily ON s.user_id = daily.user_id AND t_day >= q_day - 30 AND t_day < q_day
            UNION ALL
            SELECT row, 1, d, (d IS NOT NULL)::BIGINT, w, t, 0
            FROM s JOIN events ON s.user_id = events.user_id AND t_day = q_day AND t < q),
        merged AS (
            SELECT row, sum(n) AS n, sum(d_sum) AS d_sum, sum(d_n) AS d_n, sum(w) AS w, max(last) AS last,
                   sum(whole_days) AS whole_days
            FROM parts GROUP BY row)
        SELECT s.row, coalesce(n, 0)::BIGINT AS activity_count, d_sum / nullif(d_n, 0) AS avg_session_duration,
               (q - last) / day_us()::DOUBLE AS days_since_last,
               whole_days + (day_of(last) = q_day)::INT AS active_days, ln(1 + coalesce(w, 0)) AS activity_score
        FROM s LEFT JOIN merged ON s.row = merged.row""",
    # Running totals of each user, looked up at both ends of the window, one minus the other.
    "running totals and ASOF joins": """
        WITH r AS (
            SELECT user_id, t, count(*) OVER u AS n, sum(d) OVER u AS d_sum, count(d) OVER u AS d_n,
                   sum(w) OVER u AS w, dense_rank() OVER (PARTITION BY user_id ORDER BY t_day) AS days
            FROM e WINDOW u AS (PARTITION BY user_id ORDER BY t)),
        h AS (SELECT s.*, t, n, d_sum, d_n, w, days FROM s ASOF LEFT JOIN r ON s.user_id = r.user_id AND s.q > r.t)
        SELECT h.row, coalesce(h.n, 0) - coalesce(l.n, 0) AS activity_count,
               (coalesce(h.d_sum, 0) - coalesce(l.d_sum, 0))
               / nullif(coalesce(h.d_n, 0) - coalesce(l.d_n, 0), 0) AS avg_session_duration,
               CASE WHEN h.t >= h.lo THEN (h.q - h.t) / day_us()::DOUBLE END AS days_since_last,
               nullif(coalesce(h.days, 0) - coalesce(l.days, 0), 0) AS active_days,
               ln(1 + coalesce(h.w, 0) - coalesce(l.w, 0)) AS activity_score
        FROM h ASOF LEFT JOIN r l ON h.user_id = l.user_id AND h.lo > l.t""",
}
SORT = "SELECT * FROM read_parquet('{events}') ORDER BY user_id, happened_at"


def main() -> None:
    """Run as a program."""
    import duckdb  # the queries are also read where it isn't installed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    connection = duckdb.connect()
    connection.execute(f"SET threads = {given.threads}")
    print(json.dumps({"version": duckdb.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sort = asked["query"] == "sort"
        # The result's rows carry their number: their order may be whatever is quickest.
        connection.execute(f"SET preserve_insertion_order = {sort}")
        query = SORT.format(**asked) if sort else QUERIES[asked["query"]]
        start = time.perf_counter()
        connection.execute(VIEWS.format(**asked))
        connection.execute(f"COPY ({query}) TO '{asked['out']}' (FORMAT parquet)")
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
