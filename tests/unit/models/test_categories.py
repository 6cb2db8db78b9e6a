"""Categories: one code for a text everywhere, small numbers for a booster, missing where a version knows nothing."""

from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import ExpressionError, InvalidPackageError
from heliostat.features.aggregations import Count, First, Last, Latest, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features
from heliostat.models.categories import Categories
from heliostat.models.definitions import Label, ModelSpec
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP, text_code, text_codes
from heliostat.storage.online_store import OnlineKeys
from heliostat.training.fitting import Recipe
from tests.rings import rings_of

NOW_US = parse_instant_us("2024-06-01")
KEYS, LIMITS = OnlineKeys("hs", "test"), RingLimits(US_PER_DAY, 60_000_000)
TEXTS = ["NL", "DE", "", "日本", "NL ", "nl", "x" * 300]

user = Entity("user", keys={"user_id": "int64"})
visits = EventSource(
    "visits",
    schema=pa.schema({"id": pa.int64(), "user_id": pa.int64(), "at": TIMESTAMP, "country": pa.string()}),
    entity=user,
    event_time="at",
    event_id="id",
)
places = FeatureView(
    "places",
    version=1,
    source=visits,
    features={
        "n": Count(window="30d"),
        "country": Last("country", window="30d"),
        "first_country": First("country"),
        "said": Latest("country"),
    },
)


def events(n: int = 600, seed: int = 3) -> pa.Table:
    rng = np.random.default_rng(seed)
    texts = [None if pick == len(TEXTS) else TEXTS[pick] for pick in rng.integers(0, len(TEXTS) + 1, n)]
    at = pa.array(NOW_US - rng.integers(1, 60, n) * US_PER_DAY // 2).cast(TIMESTAMP)
    return pa.table([np.arange(n), rng.integers(0, 40, n), at, texts], schema=visits.schema)


def test_a_text_has_one_code_and_null_has_none() -> None:
    codes = text_codes(pa.chunked_array([["NL", None], ["DE", "NL"]]))
    assert codes[0] == codes[3] == text_code("NL") != codes[2]
    assert np.isnan(codes[1])
    assert text_code("NL") == 268434668503323.0, "codes are part of the storage format: they never change"


@given(st.text(max_size=30))
def test_a_code_is_a_whole_number_that_a_float_holds_exactly(text: str) -> None:
    code = text_code(text)
    assert code == int(code)
    assert 0 <= code < 2**48


def test_both_engines_give_the_code_of_the_same_text() -> None:
    table, users = events(), [str(each) for each in range(42)]
    offline = compute_features([places], table, user.encoded(users), np.full(len(users), NOW_US))
    rings = rings_of([places], table, keys=KEYS, n_buckets=1, as_of_us=NOW_US, limits=LIMITS)
    reader = FeatureReader([*places], keys=KEYS, n_buckets=1, limits=LIMITS)
    online = reader.decode([rings.get(key) for key in reader.keys(users)], as_of_us=NOW_US)
    np.testing.assert_array_equal(online.matrix, np.column_stack([offline[name] for name in online.names]))
    known = {text_code(text) for text in TEXTS}
    for name in places.categorical:
        values = online.matrix[:, online.names.index(f"places__{name}")]
        assert set(values[np.isfinite(values)]) <= known
        assert len(set(values[np.isfinite(values)])) > 3
    said, last = (online.matrix[:, online.names.index(f"places__{name}")] for name in ("said", "country"))
    assert (np.isnan(said) & np.isfinite(last)).any(), "a null that is the latest word is null; Last goes back"


def test_only_texts_are_categories() -> None:
    assert places.categorical == ("country", "first_country", "said")
    with pytest.raises(ExpressionError, match="numbers or booleans are needed"):
        FeatureView("sums", version=1, source=visits, features={"total": Sum("country")})


def test_a_version_numbers_the_codes_that_it_has_seen_and_passes_over_others() -> None:
    matrix = np.array([[1.0, 40.0], [2.0, 7.0], [3.0, np.nan], [4.0, 40.0]])
    learned = Categories.learned(matrix, ("a", "c"), ("c",))
    assert learned.codes == {"c": (7, 40)}
    asked = np.array([[0.0, 7.0], [0.0, 40.0], [0.0, 8.0], [0.0, 99.0], [0.0, np.nan]])
    np.testing.assert_array_equal(learned.encoded(asked, ("a", "c"))[:, 1], [0.0, 1.0, np.nan, np.nan, np.nan])
    assert asked[1, 1] == 40.0, "the matrix itself stays as it is"
    assert Categories.from_document(learned.to_document()) == learned


def test_codes_out_of_order_are_no_categories() -> None:
    with pytest.raises(InvalidPackageError, match="must rise"):
        Categories({"c": (4, 4)})


def test_a_packaged_model_splits_on_categories_and_knows_them_after_a_round_trip() -> None:
    spec = ModelSpec("home", user, [places["n"], places["country"]], Label.any_within("again", visits, "5d"))
    rng = np.random.default_rng(1)
    codes = text_codes(pa.array(TEXTS))
    picks = rng.integers(0, len(TEXTS), 2_000)
    matrix = np.column_stack([rng.normal(size=2_000), codes[picks]])
    labels = (np.isin(picks, [1, 4, 6])).astype(float)  # no cut through ordered codes tells these apart
    recipe = Recipe.of(spec, seed=1)
    categories = Categories.learned(matrix, spec.feature_names, spec.categorical)
    rows = recipe.dataset(categories.encoded(matrix, spec.feature_names), labels, recipe.parameters)
    text = lgb.train({**recipe.parameters, "num_threads": 1, "min_data_per_group": 1}, rows, 20).model_to_string()
    package = ModelPackage(text, Signature.of(spec), "binary", categories=categories)
    loaded = ModelPackage.from_files(package.to_files()).load()
    assert loaded.signature.categorical == ("places__country",)
    assert "\ncat_threshold=" in text
    scores = loaded.predict(np.column_stack([np.zeros(len(TEXTS)), codes]))
    assert (scores[[1, 4, 6]] > 0.7).all()
    assert (scores[[0, 2, 3, 5]] < 0.3).all()
    unseen, null = loaded.predict(np.array([[0.0, text_code("Atlantis")], [0.0, np.nan]]))
    assert unseen == null
