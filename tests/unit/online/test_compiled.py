"""The online read in C beside numpy's: the same bits, whatever the rings hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY
from heliostat.errors import RingCorruptError
from heliostat.features.aggregations import Count, Mean, StdDev, Sum
from heliostat.features.definitions import FeatureRef, FeatureView
from heliostat.features.states import State
from heliostat.online import compiled, view_plan
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingGroup, RingLimits
from heliostat.schema import integer_buckets
from heliostat.storage.bundles import rings_in
from heliostat.storage.online_store import OnlineKeys
from tests.rings import bundled
from tests.strategies import ORIGIN_US, SHOP, SOURCES, SPAN_US, USER, views

pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="built without a compiler")

KEYS = OnlineKeys("hs", "test")
LIMITS = RingLimits(US_PER_DAY, 60_000_000)
NUMBERS = np.array([0.0, 1.0, 1.0, -2.5, 0.1, 1e-12, 1e12, 1e16, -1e16, 1.7e308, np.inf, -np.inf, np.nan])


def readers(features: Sequence[FeatureRef], patch: pytest.MonkeyPatch, n_buckets: int = 4) -> list[FeatureReader]:
    """One that uses C, and one that doesn't."""
    quick = FeatureReader(features, keys=KEYS, n_buckets=n_buckets, limits=LIMITS)
    with patch.context() as without:
        without.setattr(view_plan, "can_run", lambda _: False)
        plain = FeatureReader(features, keys=KEYS, n_buckets=n_buckets, limits=LIMITS)
    return [quick, plain]


def groups(reader: FeatureReader) -> list[RingGroup]:
    return [group for plan in reader._plans for group in plan.merge.groups]


def numbers(rng: np.random.Generator, state: State, n: int, as_of_us: int) -> np.ndarray:
    """What such a state may hold, and more: infinite sums, times that are equal."""
    if state.op in ("first", "last"):
        times = np.where(rng.random(n) < 0.3, state.empty[0], as_of_us - rng.integers(0, 4, n))
        return np.column_stack([times, rng.integers(0, 3, n), rng.choice(NUMBERS, n)])
    if state.op == "or":
        return rng.integers(0, 2**52, (n, 1)).astype(np.float64)
    if state.of == "time":
        return np.where(rng.random(n) < 0.2, state.empty[0], as_of_us - rng.integers(0, 40 * US_PER_DAY, n))[:, None]
    if state.of == "one" or state.bins is not None or state.op == "moments":
        return rng.integers(0, rng.integers(1, 4), (n, state.width)).astype(np.float64)
    return rng.choice(NUMBERS, (n, state.width)) if rng.random() < 0.5 else rng.normal(0, 1e3, (n, state.width))


def ring(rng: np.random.Generator, group: RingGroup, as_of_us: int) -> bytes | None:
    """Slots around the instant and before it, the newest one last; or nothing."""
    n = min(int(rng.choice([0, 1, 2, 7, 30, 200])), group.n_slots)
    if n == 0:
        return None if rng.random() < 0.5 else b""
    newest = as_of_us // group.hop_us + 2
    tiles = newest - np.sort(rng.choice(group.n_slots + 3, n, replace=False))[::-1].astype(np.float64)
    slots = np.tile(group.empty_slot, (n, 1))
    slots[:, 0] = tiles + np.where(rng.random(n) < 0.5, 0.0, 0.25 + 0.5 * rng.random(n))
    if group.life and rng.random() < 0.2:
        slots[0, 0] = -np.inf
    for state in group.states:
        slots[:, group.columns[state.key]] = numbers(rng, state, n, as_of_us)
    return slots.tobytes()


def bundle(rng: np.random.Generator, reader: FeatureReader, at: int, as_of_us: int) -> bytes | None:
    """Rings of the views of one source and entity, in any order, and others'; or nothing."""
    own = [group for plan in reader._plans if plan.bundle == at for group in plan.merge.groups]
    rings = {group.ring_id: ring(rng, group, as_of_us) or b"" for group in own}
    rings |= {rng.bytes(16): bytes(8 * int(rng.integers(1, 5))) for _ in range(rng.integers(0, 3))}
    shuffled = bundled({each: rings[each] for each in rng.permutation(np.array(list(rings), dtype=object))})
    return shuffled or (None if rng.random() < 0.5 else b"")


def bits(values: np.ndarray) -> list[Any]:
    """All NaNs are one."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64).tolist()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_c_and_numpy_give_the_same_bits_for_any_views_and_rings(data: st.DataObject) -> None:
    declared = [data.draw(views(name=f"view{at}")) for at in range(data.draw(st.integers(1, 3)))]
    features = [feature for view in declared for feature in view]
    features = data.draw(st.lists(st.sampled_from(features), min_size=1, max_size=12))
    as_of_us = data.draw(st.integers(ORIGIN_US, ORIGIN_US + SPAN_US))
    n, rng = data.draw(st.integers(0, 5)), np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with pytest.MonkeyPatch.context() as patch:
        quick, plain = readers(features, patch)
    # Views over one source share an entity's bundle, which may hold rings of others as well.
    values = [bundle(rng, quick, at, as_of_us) for at in range(len(quick._bundles)) for _ in range(n)]
    names = sorted(quick.overridable)
    overrides = data.draw(
        st.none() | st.lists(st.dictionaries(st.sampled_from(names), st.just(7.5)), min_size=n, max_size=n)
    )
    with np.errstate(all="ignore"):  # of derived features
        one, other = (each.decode(values, as_of_us=as_of_us, overrides=overrides) for each in (quick, plain))
    assert bits(one.matrix) == bits(other.matrix)
    assert bits(one.newest_us) == bits(other.newest_us)
    assert one.absent.tolist() == other.absent.tolist()


def test_every_plain_function_goes_by_c_and_the_rest_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES[USER.name]
    features = {"n": Count(window="30d"), "mean": Mean("amount", window="30d"), "total": Sum("amount")}
    view = FeatureView("plain", version=1, source=source, entity=USER, features=features)
    quick, plain = readers([*view], monkeypatch)
    assert [plan.direct for plan in quick._plans] == [True]
    assert [plan.program for plan in plain._plans] == [None]
    spread = FeatureView("mixed", version=1, source=source, entity=USER, features=features | {"s": StdDev("amount")})
    (plan,) = readers([*spread], monkeypatch)[0]._plans
    assert plan.program is not None
    assert (plan.direct, plan.rest is not None and list(plan.rest.features)) == (False, ["s"])


def test_a_derived_feature_cant_change_what_it_is_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    view = FeatureView("own", version=1, source=SOURCES[USER.name], entity=USER, features={"n": Count(window="30d")})

    @view.derived
    def more(n: np.ndarray) -> np.ndarray:
        n += 1
        return n

    for reader in readers([*view], monkeypatch):
        with pytest.raises(ValueError, match="read-only"):
            reader.decode([None], as_of_us=ORIGIN_US)
    with pytest.raises(ValueError, match="read-only"):
        view.derive({"n": np.zeros(1)})


def test_a_ring_of_half_a_slot_is_named_with_its_view_and_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    view = FeatureView("one", version=1, source=SOURCES[USER.name], entity=USER, features={"n": Count(window="30d")})
    for reader in readers([*view], monkeypatch):
        (group,) = groups(reader)
        slot = group.empty_slot.tobytes()
        rings = [bundled({group.ring_id: each}) for each in (slot, slot + slot[:8])]
        with pytest.raises(RingCorruptError, match=str(len(slot) + 8)) as raised:
            reader.decode([*rings, None], as_of_us=ORIGIN_US)
        assert "one@1" in str(raised.value)


def test_a_program_is_never_run_over_what_it_wasnt_written_for() -> None:
    view = FeatureView("one", version=1, source=SOURCES[USER.name], entity=USER, features={"n": Count(window="30d")})
    reader = FeatureReader([*view], keys=KEYS, n_buckets=1, limits=LIMITS)
    program = reader._plans[0].program
    assert program is not None
    out, newest, absent = np.empty((2, 1)), np.empty(2), np.empty((2, 1), np.bool_)

    def run(values: Any, first: int = 0, **results: Any) -> None:
        results = {"out": out, "newest_us": newest, "absent": absent, "view": 0} | results
        program.run(values, first, ORIGIN_US, **results)

    run([None, None])
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (IndexError, {"values": [None]}),
        (IndexError, {"values": [None, None], "first": 1}),
        (IndexError, {"values": [None, None], "view": 1}),
        (IndexError, {"values": [None, None], "newest_us": np.empty(3)}),
        (IndexError, {"values": [None, None], "out": np.empty((2, 0))}),
        (TypeError, {"values": [None, "text"]}),
        (TypeError, {"values": [None, None], "out": np.empty((2, 1), np.float32)}),
        (TypeError, {"values": [None, None], "absent": np.empty(2, np.bool_)}),
        (ValueError, {"values": [None, b"1234567"]}),
    ]
    for error, changed in wrong:
        with pytest.raises(error):
            run(**changed)
    program._code = b"\1" + program._code[1:]
    with pytest.raises(ValueError, match="format"):
        run([None, None])


def test_one_ring_of_each_bundle_is_the_same_in_c_and_in_python() -> None:
    one, other = b"1" * 16, b"2" * 16
    values = [
        bundled({one: b"a" * 8, other: b"b" * 16}),
        bundled({other: b"c" * 8}),
        None,
        b"",
        bundled({one: b"d" * 8}),
    ]
    for each in (one, other, b"3" * 16):
        assert compiled.rings_of(values, each) == [rings_in(value).get(each, b"") for value in values]
    with pytest.raises(TypeError, match="16 bytes"):
        compiled.rings_of(values, b"short")


INT64S = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 10**18, 2**63 - 1, -(2**63)])


@given(st.lists(INT64S, max_size=12), st.integers(1, 300))
def test_integer_keys_have_the_same_names_in_c(ids: list[int], n_buckets: int) -> None:
    tags = tuple(f"{{b{bucket}}}:" for bucket in range(n_buckets))
    buckets = integer_buckets(ids, n_buckets)
    expected = [
        f"{prefix}{tags[at]}{each}" for prefix in ("a:", "bb:") for at, each in zip(buckets, ids, strict=True)
    ]
    for texts in ([str(each) for each in ids], tuple(map(str, ids))):  # as jobs have them, and as requests do
        assert compiled.bundle_names(("a:", "bb:"), tags, texts) == expected


@pytest.mark.parametrize(
    "text", ["", "-", "-0", "007", "+7", " 7", "7 ", "1_0", "٣", "9223372036854775808", "-9223372036854775809", "7.0"]
)
def test_a_text_that_isnt_an_integer_as_we_write_it_is_left_to_python(text: str) -> None:
    assert compiled.bundle_names(("a:",), ("{b0}:",), ["1", text]) is None


def test_keys_of_texts_and_of_several_entities_are_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    other = FeatureView("s", version=1, source=SOURCES[SHOP.name], entity=SHOP, features={"n": Count(window="30d")})
    reader, _ = readers([*other], monkeypatch)
    assert reader._only_entity is None
