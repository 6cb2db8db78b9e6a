from __future__ import annotations

import hashlib
import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import InvalidRouteError
from heliostat.experiments import assignment
from heliostat.experiments.assignment import N_SLOTS, OUTSIDE, RoutingDocument, Variant, slot_of, slots_of

ENTITIES = [str(number) for number in range(5_000)]


def _split(weight: float = 0.5, coverage: float = 1.0, salt: str = "churn/spring") -> RoutingDocument:
    return RoutingDocument(
        "churn", 3, salt, coverage, (Variant("control", 1, 1 - weight), Variant("challenger", 2, weight))
    )


@st.composite
def documents(draw: st.DrawFn) -> RoutingDocument:
    parts = draw(st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(sum))
    variants = tuple(Variant(f"v{i}", i + 1, part / sum(parts)) for i, part in enumerate(parts))
    return RoutingDocument("churn", 1, draw(st.text(min_size=1)), draw(st.floats(0, 1)), variants)


# ── Slots ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("salt", "entity", "slot"),
    [
        # md5sum's first 16 digits, modulo 10,000: printf s:1 | md5sum
        ("s", "1", 190),
        ("churn/spring", "12345", 5979),
    ],
)
def test_slots_are_part_of_the_storage_format(salt: str, entity: str, slot: int) -> None:
    assert slot_of(salt, entity) == slot


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=20))
def test_slots_of_many_are_those_of_each(salt: str, entities: list[str]) -> None:
    digests = [hashlib.new("md5", f"{salt}:{each}".encode(), usedforsecurity=False) for each in entities]
    expected = [int(digest.hexdigest()[:16], 16) % N_SLOTS for digest in digests]
    assert slots_of(salt, entities).tolist() == [slot_of(salt, each) for each in entities] == expected


@pytest.mark.parametrize("length", [0, 1, 46, 47, 48, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1_000])
def test_keys_of_any_length_have_the_slots_that_python_finds(length: int) -> None:
    keys = ["k" * length, "\u00e9" * length, "\U0001f600" * (length // 4)]
    assert slots_of("s", keys).tolist() == assignment._python_slots(b"s:", keys).tolist()


def test_what_is_no_text_has_no_slot() -> None:
    with pytest.raises((TypeError, AttributeError)):
        slots_of("s", ["1", 2])  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        slots_of("s", ["\ud800"])


def test_slots_are_found_in_c_wherever_there_is_a_compiler() -> None:
    assert assignment._slots is not None or shutil.which("cc") is None


def test_slots_are_spread_evenly() -> None:
    counts = np.bincount(slots_of("churn/spring", map(str, range(100_000))) // 1_000, minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_another_salt_draws_independently() -> None:
    first, second = (_split(0.5, salt=salt).assign(ENTITIES) for salt in ("churn/spring", "churn/summer"))
    both = int(((first == 1) & (second == 1)).sum())
    assert abs(both - len(ENTITIES) / 4) < 4 * np.sqrt(len(ENTITIES) * 0.25 * 0.75)


# ── Assignment ──────────────────────────────────────────────────────────────────────


@given(document=documents(), entities=st.lists(st.text(max_size=8), max_size=20))
def test_one_by_one_is_as_all_at_once(document: RoutingDocument, entities: list[str]) -> None:
    indices = document.assign(entities)
    assert indices.shape == (len(entities),)
    expected = [None if index == OUTSIDE else document.variants[index] for index in indices]
    assert [document.variant_of(entity) for entity in entities] == expected


@given(document=documents(), wider=st.floats(0, 1))
def test_raising_coverage_reassigns_nobody(document: RoutingDocument, wider: float) -> None:
    narrow = replace(document, coverage=min(wider, document.coverage))
    wide = replace(document, coverage=max(wider, document.coverage))
    before, after = narrow.assign(ENTITIES[:300]), wide.assign(ENTITIES[:300])
    inside = before != OUTSIDE
    np.testing.assert_array_equal(before[inside], after[inside])


@given(document=documents())
def test_ranges_never_overlap_and_full_coverage_leaves_no_gap(document: RoutingDocument) -> None:
    edges = [edge for pair in document.ranges for edge in pair]
    assert edges == sorted(edges)
    full = replace(document, coverage=1.0).ranges
    assert (full[0][0], full[-1][1]) == (0, N_SLOTS)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(full))


@given(document=documents())
def test_a_range_is_coverage_times_weight_wide(document: RoutingDocument) -> None:
    for variant, (low, high) in zip(document.variants, document.ranges, strict=True):
        assert abs((high - low) - document.coverage * variant.weight * N_SLOTS) <= 1.5


@pytest.mark.parametrize(("weight", "coverage"), [(0.5, 1.0), (0.1, 1.0), (0.3, 0.2)])
def test_the_shares_are_the_declared_ones(weight: float, coverage: float) -> None:
    indices = _split(weight, coverage).assign(ENTITIES)
    expected = coverage * weight * len(ENTITIES)
    assert abs(int((indices == 1).sum()) - expected) < 4 * np.sqrt(expected)


@given(step=st.integers(0, N_SLOTS))
def test_splits_go_from_none_to_all_in_steps_of_a_ten_thousandth(step: int) -> None:
    for document in (_split(step / N_SLOTS), _split(1.0, coverage=step / N_SLOTS)):
        low, high = document.ranges[1]
        assert high - low == step


def test_a_variant_without_weight_serves_nobody() -> None:
    assert set(_split(0.0).assign(ENTITIES).tolist()) == {0}


def test_a_single_version_serves_everybody_without_hashing() -> None:
    single = RoutingDocument.single("churn", 4, revision=1, shadow=(5,))
    assert single.assign(iter(ENTITIES)).tolist() == [0] * len(ENTITIES)
    assert (single.control.version, single.is_split, single.versions) == (4, False, (4, 5))


def test_whoever_is_outside_has_no_variant() -> None:
    assert _split(coverage=0.0).variant_of("1") is None
    assert set(_split(coverage=0.0).assign(ENTITIES).tolist()) == {OUTSIDE}


# ── The document ────────────────────────────────────────────────────────────────────


@given(document=documents())
@settings(max_examples=50)
def test_a_document_comes_back_from_its_bytes(document: RoutingDocument) -> None:
    assert RoutingDocument.from_bytes(document.to_bytes()) == document


def _changed(**parts: object) -> RoutingDocument:
    return replace(_split(), **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"variants": ()}, "no variant"),
        ({"variants": (Variant("a", 1, 0.5), Variant("a", 2, 0.5))}, "name each differently"),
        ({"variants": (Variant("a", 1, 0.5), Variant("b", 2, 0.4))}, "add up to 0.9"),
        ({"variants": (Variant("a", 1, 1.5), Variant("b", 2, -0.5))}, "the weights are"),
        ({"variants": (Variant("a", 1, float("nan")),)}, "the weights are"),
        ({"variants": (Variant("a", 0, 1.0),)}, "the versions are"),
        ({"shadow": (0,)}, "the versions are"),
        ({"coverage": 1.1}, "coverage is 1.1"),
        ({"revision": 0}, "revision is 0"),
        ({"salt": ""}, "salt is empty"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(parts: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRouteError, match=problem):
        _changed(**parts)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"model": "churn"}',
        _split().to_bytes().replace(b'"format":1', b'"format":9'),
        _split().to_bytes().replace(b'"coverage":1.0', b'"coverage":"all"'),
        _split().to_bytes().replace(b'"shadow":[]', b'"shadow":7'),
    ],
)
def test_bytes_that_are_no_document_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRouteError, match="publish it again"):
        RoutingDocument.from_bytes(content)
