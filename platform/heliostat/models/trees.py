"""A LightGBM model's trees as `_trees.c` walks them: what the library says, bit by bit, for numbers alone.

The text of a model says all of its trees. What has a meaning here that isn't that of the library is left to the
library: categories as sets, linear leaves, several classes, zeros that count as nulls, averaged forests, and
objectives whose scale isn't one of three.

Source: LightGBM's ``Tree::ToString`` and ``Tree::NumericalDecision`` (include/LightGBM/tree.h), release 4.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from heliostat.models import _trees
except ImportError:  # built without a compiler
    _trees = None  # type: ignore[assignment]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FORMAT = 2
AVAILABLE = _trees is not None and _trees.FORMAT == _FORMAT and sys.byteorder == "little"
"""Whether the package was built with it."""

_PLAIN, _LOGISTIC, _EXPONENTIAL = range(3)
_SCALES: Final[Mapping[str, int]] = {
    "binary": _LOGISTIC,
    "cross_entropy": _LOGISTIC,
    **dict.fromkeys(("regression", "regression_l1", "huber", "fair", "quantile", "mape"), _PLAIN),
    **dict.fromkeys(("poisson", "gamma", "tweedie"), _EXPONENTIAL),
}
# Of `decision_type`: categories, nulls go left, and how nulls are told: not at all, as 0, as NaN.
_CATEGORICAL, _NULLS_LEFT, _NULLS_AT = 1, 2, 2
_NONE, _NAN = 0, 2
_MOST_COLUMNS = 2**24
# Which of a column's copies a node reads; 0: the one whose nulls go right.
_NULLS_GO_LEFT, _IS_NULL = 1, 2

_ODD: Final = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-36, -1e-36, 1e300, -1e300])
_ODD_SHARE = 0.2

_NODE: Final = np.dtype([("threshold", "<f8"), ("left", "<i4"), ("column", "<i4")])


class Trees:
    """Predicts; threads may share it.

    Args:
        code: What `_trees.c` reads.
        n_columns: Features that it wants.
        edges: Each split's column and threshold.
    """

    def __init__(self, code: bytes, n_columns: int, edges: tuple[IntArray, FloatArray]) -> None:
        self._code, self._n_columns, self._edges = code, n_columns, edges

    def __call__(self, matrix: FloatArray) -> FloatArray:
        """Predictions, shape ``(n,)``, for float64 features, C-contiguous, shape ``(n, n_columns)``.

        Raises:
            ValueError: If it has other columns.
        """
        out = np.empty(len(matrix))
        _trees.predict(self._code, matrix, out)
        return out

    def trial(self, n: int) -> FloatArray:
        """Rows that are hard to get right, shape ``(n, n_columns)``: on thresholds, beside them, and odd ones."""
        random = np.random.default_rng(0)
        rows = random.choice(_ODD, (n, self._n_columns))
        columns, thresholds = self._edges
        for column in np.unique(columns).tolist():
            known = random.choice(thresholds[columns == column], n)
            known = np.nextafter(known, known + random.choice([-1.0, 0.0, 1.0], n))
            rows[:, column] = np.where(random.random(n) < _ODD_SHARE, rows[:, column], known)
        return rows


def compiled(text: str, *, n_columns: int, n_trees: int | None = None) -> Trees | None:
    """A model's trees; None if there is something in it that `_trees.c` has no word for.

    Args:
        text: As ``Booster.model_to_string`` gives it.
        n_columns: Features that the booster wants.
        n_trees: How many of the trees count; None: all.
    """
    head, *sections = re.split(r"^Tree=\d+$", text.partition("\nend of trees")[0], flags=re.MULTILINE)
    told = _told(head)
    scale = _scale_of(*told.get("objective", "").split())
    unlike = "average_output" in head.split() or told.get("num_tree_per_iteration", "1") != "1"
    if not AVAILABLE or scale is None or unlike or not 0 < n_columns < _MOST_COLUMNS:
        return None
    try:
        trees = [_tree(_told(each), n_columns) for each in sections[:n_trees]]
    except (KeyError, ValueError):  # no tree of release 4's
        return None
    known = [each for each in trees if each is not None]
    if len(known) < len(trees) or not trees:
        return None
    firsts = np.cumsum([0, *(len(each.nodes) for each in known)])
    for each, first in zip(known, firsts.tolist(), strict=False):
        each.nodes["left"] += first
    nodes = np.concatenate([each.nodes for each in known])
    leaves = np.concatenate([each.values for each in known])
    heads = np.stack([firsts[:-1], [each.depth for each in known]], axis=1)
    packed = struct.pack("<5qd", _FORMAT, len(known), len(nodes), n_columns, *scale)
    code = b"".join([packed, heads.astype("<i4").tobytes(), nodes.tobytes(), leaves.tobytes()])
    splits = nodes[np.isfinite(nodes["threshold"])]
    return Trees(code, n_columns, (splits["column"].astype(np.int64) % n_columns, splits["threshold"].copy()))


def _told(section: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in section.splitlines() if "=" in line)


def _scale_of(objective: str = "", *options: str) -> tuple[int, float] | None:
    """What turns a sum into a prediction, and its factor; None if that isn't known."""
    known = _SCALES.get(objective)
    if known is None:
        return None
    if objective == "binary" and len(options) == 1 and options[0].startswith("sigmoid:"):
        return known, float(options[0].removeprefix("sigmoid:"))
    return None if options else (known, 1.0)


class _Tree(NamedTuple):
    """One tree, its left children's numbers counted from its own first node."""

    nodes: NDArray[np.void]
    values: FloatArray
    depth: int


def _tree(told: Mapping[str, str], n_columns: int) -> _Tree | None:
    """A tree from its lines; None if it is of another kind.

    Raises:
        KeyError: If a line is missing.
        ValueError: If one says what can't be.
    """
    if told.get("num_cat", "0") != "0" or told.get("is_linear", "0") != "0":
        return None
    n_leaves = int(told["num_leaves"])
    nodes, values = np.zeros(2 * n_leaves - 1, _NODE), np.zeros(2 * n_leaves - 1)
    leaves = _numbers(told, "leaf_value", np.float64, n_leaves)
    if n_leaves == 1:
        nodes["threshold"], values[:] = np.inf, leaves
        return _Tree(nodes, values, 0)
    thresholds, columns, kinds, lefts, rights = (
        _numbers(told, name, dtype, n_leaves - 1)
        for name, dtype in (
            ("threshold", np.float64),
            ("split_feature", np.int64),
            ("decision_type", np.int64),
            ("left_child", np.int64),
            ("right_child", np.int64),
        )
    )
    nulls = kinds >> _NULLS_AT & 3
    if (kinds & _CATEGORICAL).any() or not np.isin(nulls, (_NONE, _NAN)).all() or np.isnan(thresholds).any():
        return None
    # Each is the child of one other, but for the first: then no path comes back, and none leads out of the tree.
    if sorted([*lefts.tolist(), *rights.tolist()]) != [*range(-n_leaves, 0), *range(1, n_leaves - 1)]:
        raise ValueError("its children")
    if columns.min() < 0 or columns.max() >= n_columns:
        raise ValueError("its features")
    nulls_left = np.where(nulls == _NAN, (kinds & _NULLS_LEFT) != 0, thresholds >= 0.0)
    nulls_apart = ~nulls_left & (thresholds == np.inf)  # from all numbers, infinity among them
    thresholds[nulls_apart] = 0.0
    columns += n_columns * np.where(nulls_apart, _IS_NULL, np.where(nulls_left, _NULLS_GO_LEFT, 0))
    depth = 0
    for split, place, level, left in _placed(lefts.tolist(), rights.tolist()):
        depth = max(depth, level)
        if split < 0:
            nodes[place], values[place] = (np.inf, place, 0), leaves[~split]
        else:
            nodes[place] = (thresholds[split], left, columns[split])
    return _Tree(nodes, values, depth)


def _placed(lefts: list[int], rights: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Each node of a tree: its split (or ``~leaf``), its place, its level, and the place of its left child.

    Children stand side by side, and near to their parents.
    """
    waiting, free = [(0, 0, 0)], 1
    for split, place, level in waiting:
        yield split, place, level, free
        if split >= 0:
            waiting += [(lefts[split], free, level + 1), (rights[split], free + 1, level + 1)]
            free += 2


def _numbers(told: Mapping[str, str], name: str, dtype: type[np.generic], n: int) -> NDArray[Any]:
    found = np.array(told[name].split(), dtype=dtype)
    if len(found) != n:
        raise ValueError(name)
    return found
