from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat import (
    Count,
    DistinctDays,
    Entity,
    EventSource,
    FeatureView,
    FloatArray,
    Mean,
    Sum,
    TimeSinceLast,
)
from heliostat.errors import (
    DefinitionError,
    DuplicateNameError,
    ExpressionError,
    InvalidDefinitionError,
    InvalidValueError,
    KeyColumnError,
    UnknownColumnError,
    UnknownFeatureError,
    WindowError,
)

user = Entity("user", keys={"user_id": "int64"})
device = Entity("device", keys={"account": "string", "device": "int64"})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "user_id": pa.int64(),
        "account": pa.string(),
        "device": pa.int64(),
        "at": pa.timestamp("ms"),
        "kind": pa.string(),
        "amount": pa.float64(),
    }
)
activity = EventSource("activity", schema=SCHEMA, entity=[user, device], event_time="at", event_id="id")


def view(**changes: object) -> FeatureView:
    arguments: dict = {
        "version": 1,
        "source": activity,
        "entity": user,
        "features": {"n": Count(window="30d"), "total": Sum("amount", window="30d")},
    }
    return FeatureView("facts", **{**arguments, **changes})


@pytest.mark.parametrize(
    ("declare", "error", "says"),
    [
        (lambda: Entity("a b", keys={"x": "int64"}), InvalidDefinitionError, "no usable name"),
        (lambda: Entity("a__b", keys={"x": "int64"}), InvalidDefinitionError, "no usable name"),
        (lambda: Entity("user", keys={}), InvalidDefinitionError, "no key"),
        (lambda: Entity("user", keys={"x": "float"}), InvalidDefinitionError, "int64 or string"),
        (lambda: view(version=0), InvalidDefinitionError, "count from 1"),
        (lambda: view(features={}), InvalidDefinitionError, "no features"),
        (lambda: view(entity=None), InvalidDefinitionError, "say which"),
        (lambda: view(entity=Entity("shop", keys={"s": "int64"})), InvalidDefinitionError, "isn't about 'shop'"),
        (lambda: view(features={"x": Sum("amuont", window="1d")}), UnknownColumnError, "amount"),
        (lambda: view(features={"x": Sum("kind", window="1d")}), ExpressionError, "numbers"),
        (lambda: view(features={"x": Sum(pc.field("nope") * 2)}), ExpressionError, "columns are: id"),
        (lambda: view(features={"x": Count(where=pc.field("amount") + 1)}), ExpressionError, "true or false"),
        (lambda: view(where=pc.field("nope") == 1), ExpressionError, "nope"),
        (lambda: view(features={"x": Count}), InvalidDefinitionError, "no aggregation"),
        (lambda: view(features={"x": Count(window="30x")}), WindowError, "30d, 12h"),
        (lambda: view(features={"x": Count(window="90m")}, hop="1h"), WindowError, "multiple of its hop"),
        (lambda: view(hop="7h"), WindowError, "divide a day"),
        (lambda: view(features={"x": DistinctDays()}), WindowError, "365d"),
        (lambda: Mean(), InvalidDefinitionError, "needs a column"),
        (lambda: TimeSinceLast(unit="year"), InvalidDefinitionError, "second, minute, hour, day"),
        (
            lambda: EventSource("e", schema=SCHEMA, entity=user, event_time="when", event_id="id"),
            UnknownColumnError,
            "there are: id, user_id",
        ),
        (
            lambda: EventSource("e", schema=SCHEMA, entity=user, event_time="kind", event_id="id"),
            InvalidDefinitionError,
            "timestamp",
        ),
        (
            lambda: EventSource("e", schema=SCHEMA, entity=user, event_time="at", event_id="amount"),
            InvalidDefinitionError,
            "integers or strings",
        ),
    ],
)
def test_a_declaration_that_does_not_fit_fails_at_once_and_says_why(
    declare: Callable[[], object], error: type[DefinitionError], says: str
) -> None:
    with pytest.raises(error) as caught:
        declare()
    assert says in str(caught.value)


def test_a_derived_feature_names_features_of_its_view() -> None:
    declared = view()

    @declared.derived
    def mean(total: FloatArray, n: FloatArray) -> FloatArray:
        return total / n

    assert declared.feature_names == ("n", "total", "mean")
    with pytest.raises(UnknownFeatureError, match="it defines: n, total, mean"):
        declared.derived(lambda_named("other", "missing"))
    with pytest.raises(DuplicateNameError, match="twice"):
        declared.derived(lambda_named("n", "total"))
    columns = {"n": np.array([2.0, 0.0]), "total": np.array([3.0, 0.0])}
    declared.derive(columns)
    assert columns["mean"][0] == 1.5
    assert np.isnan(columns["mean"][1])


def lambda_named(name: str, parameter: str) -> Callable[..., FloatArray]:
    namespace: dict = {}
    exec(f"def {name}({parameter}): return {parameter}", namespace)  # noqa: S102 - a function with a chosen name
    return namespace[name]


def test_the_content_hash_changes_with_the_meaning_and_not_with_the_words() -> None:
    same = view(owner="somebody", description="words", tags={"team": "x"})
    assert same.content_hash == view().content_hash
    others = [
        view(version=2),
        view(ttl="30d"),
        view(hop="1h"),
        view(where=pc.field("kind") == "login"),
        view(features={"n": Count(window="31d"), "total": Sum("amount", window="30d")}),
        view(features={"n": Count(window="30d"), "total": Sum(pc.field("amount") * 2, window="30d")}),
        view(entity=device),
    ]
    assert len({each.content_hash for each in [view(), *others]}) == 8


def test_hops_follow_windows_and_days_are_counted_by_day() -> None:
    declared = view(
        features={
            "long": Count(window="12d"),
            "middle": Count(window="12h"),
            "short": Count(window="1h"),
            "days": DistinctDays(window="2d"),
        }
    )
    hops = {name: each.hop_us // 60_000_000 for name, each in declared.base_features.items() if each.hop_us}
    assert hops == {"long": 1440, "middle": 60, "short": 5, "days": 1440}


@given(st.text(min_size=1), st.integers(-(2**63), 2**63 - 1))
def test_the_text_of_a_key_of_several_columns_reads_back(account: str, number: int) -> None:
    key = {"account": account, "device": number}
    text = device.text(key)
    assert device.parse(text) == key
    assert device.text(text) == text


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=20))
def test_encoded_keys_are_the_same_from_a_table_and_from_texts(keys: list[tuple[str, int]]) -> None:
    table = pa.table({"account": [key[0] for key in keys], "device": pa.array([key[1] for key in keys], pa.int64())})
    texts = [device.text({"account": account, "device": number}) for account, number in keys]
    assert device.encode(table).to_pylist() == texts
    assert (device.buckets(device.encode(table), 16) == device.buckets(device.encoded(texts), 16)).all()


@pytest.mark.parametrize("key", ["abc", 1.5, True, None, 2**63, {"user": 1}, {}])
def test_a_key_of_the_wrong_type_is_refused(key: object) -> None:
    with pytest.raises(InvalidValueError, match="user"):
        user.text(key)
    with pytest.raises(InvalidValueError, match="user"):
        user.texts([7, key])


def test_many_keys_have_the_texts_of_each() -> None:
    keys = [7, -(2**63), 2**63 - 1, "12", np.int64(5)]
    assert user.texts(keys) == [user.text(key) for key in keys] == ["7", str(-(2**63)), str(2**63 - 1), "12", "5"]


def test_null_and_missing_keys_are_refused_with_the_column() -> None:
    with pytest.raises(KeyColumnError, match="null in 1 rows"):
        user.encode(pa.table({"user_id": pa.array([1, None], pa.int64())}))
    with pytest.raises(KeyColumnError, match="is missing; columns are: other"):
        user.encode(pa.table({"other": [1]}))
    with pytest.raises(KeyColumnError, match="not int64"):
        user.encode(pa.table({"user_id": ["a"]}))


def test_buckets_never_move() -> None:
    """These numbers are part of the storage format."""
    assert user.buckets(pa.array([0, 1, 2, 12345, -1]), 16).tolist() == [15, 1, 14, 0, 0]
    assert device.buckets(pa.array(["a|1", "b|2", "ä|3"]), 16).tolist() == [12, 4, 14]


def test_several_windows_in_one_line_are_as_many_features_in_place() -> None:
    declared = view(
        features={"n": Count(window="1d"), "spend": Sum("amount", windows=("7d", "30 d")), "days": Sum("device")}
    )
    assert declared.feature_names == ("n", "spend_7d", "spend_30d", "days")
    apart = view(
        features={
            "n": Count(window="1d"),
            "spend_7d": Sum("amount", window="7d"),
            "spend_30d": Sum("amount", window="30d"),
            "days": Sum("device"),
        }
    )
    assert declared.content_hash == apart.content_hash


def test_derived_features_see_each_of_the_windows() -> None:
    facts = view(features={"spend": Sum("amount", windows=("7d", "30d"))})

    @facts.derived
    def share(spend_7d: FloatArray, spend_30d: FloatArray) -> FloatArray:
        return spend_7d / spend_30d

    assert facts.needed(["share"]) == ("spend_7d", "spend_30d", "share")


@pytest.mark.parametrize(
    "features",
    [
        {"spend_7d": Count(window="7d"), "spend": Sum("amount", windows=("7d", "30d"))},
        {"spend": Sum("amount", windows=("7d", "30d")), "spend_30d": Count(window="30d")},
        {"spend": Sum("amount", windows=("7d", "7d"))},
    ],
)
def test_a_window_that_clashes_with_another_feature_is_refused(features: dict) -> None:
    with pytest.raises(DuplicateNameError, match="spend_"):
        view(features=features)


def test_windows_that_cant_be_used_are_refused() -> None:
    with pytest.raises(WindowError, match="one of them"):
        Sum("amount", window="7d", windows=("7d", "30d"))
    with pytest.raises(WindowError, match="no list"):
        Sum("amount", windows="7d")  # type: ignore[arg-type]
    with pytest.raises(WindowError, match="no list"):
        Sum("amount", windows=())
    with pytest.raises(WindowError, match="no duration"):
        Sum("amount", windows=("7d", "soon"))
    with pytest.raises(InvalidDefinitionError, match="no usable name"):
        view(features={"spend_": Sum("amount", windows=("7d", "30d"))})
    assert view(features={"days": DistinctDays(windows=("7d", "30d"))}).feature_names == ("days_7d", "days_30d")
