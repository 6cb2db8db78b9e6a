"""Which version serves which entity: salted, deterministic, the same in every process. Pure.

An entity's slot is a number in [0, 10,000) from a hash of the experiment's salt and its key.
Every variant owns a range of slots: it starts at the variant's cumulative weight and is
``coverage × weight`` wide. So raising the coverage adds entities to variants and never moves
one from a variant to another. Whoever is in no range isn't in the experiment; the first
variant, the control, serves them too, and they count for nobody.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import md5
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.errors import InvalidRouteError

try:
    from heliostat.experiments import _slots
except ImportError:  # built without a compiler
    _slots = None  # type: ignore[assignment]

N_SLOTS: Final = 10_000
OUTSIDE: Final = -1
"""The variant index of an entity that isn't in the experiment."""

_FORMAT: Final = 1


def slot_of(salt: str, entity: str) -> int:
    """The slot of one entity, in [0, 10,000): the first eight bytes, as a number, of the MD5 of ``salt:entity``.

    A salt of its own for each experiment keeps experiments independent: with one hash for all, the same
    entities would be the guinea pigs each time.

    Args:
        salt: The experiment's.
        entity: The entity's key as text (`Entity.text`).
    """
    return int(slots_of(salt, [entity])[0])


def slots_of(salt: str, entities: Iterable[str]) -> NDArray[np.int32]:
    """The slots of many entities, shape ``(n,)``."""
    prefix = f"{salt}:".encode()
    if _slots is None:
        return _python_slots(prefix, entities)
    return np.frombuffer(_slots.slots(prefix, [*entities]), np.int32)


def _python_slots(prefix: bytes, entities: Iterable[str]) -> NDArray[np.int32]:
    digests = b"".join([md5(prefix + entity.encode(), usedforsecurity=False).digest() for entity in entities])
    return (np.frombuffer(digests, dtype=">u8")[::2] % N_SLOTS).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Variant:
    """One arm.

    Attributes:
        name: Such as ``control``.
        version: The model version that serves it.
        weight: Its share of the experiment, in [0, 1].
    """

    name: str
    version: int
    weight: float


@dataclass(frozen=True)
class RoutingDocument:
    """Which versions of a model serve, and whom. It rides along with the features of every request.

    Attributes:
        model: The model's name.
        revision: 1, 2, …: raised by every change.
        salt: The experiment's; it decides who gets what.
        coverage: Share of the entities that are in the experiment, in [0, 1].
        variants: The arms, the control first; their weights add up to 1.
        shadow: Versions that are scored and logged, but answer nobody.

    Raises:
        InvalidRouteError: If it contradicts itself.
    """

    model: str
    revision: int
    salt: str
    coverage: float
    variants: tuple[Variant, ...]
    shadow: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        weights = [variant.weight for variant in self.variants]
        versions = [*(variant.version for variant in self.variants), *self.shadow]
        checks = (
            (bool(self.variants), "it has no variant", "name at least a control"),
            (
                all(names) and len(set(names)) == len(names),
                f"the variants are named {names}",
                "name each differently",
            ),
            (all(0.0 <= weight <= 1.0 for weight in weights), f"the weights are {weights}", "keep each in [0, 1]"),
            (
                math.isclose(math.fsum(weights), 1.0, abs_tol=1e-9),
                f"the weights add up to {math.fsum(weights):g}",
                "make them add up to 1",
            ),
            (0.0 <= self.coverage <= 1.0, f"the coverage is {self.coverage:g}", "keep it in [0, 1]"),
            (all(version >= 1 for version in versions), f"the versions are {versions}", "count from 1"),
            (self.revision >= 1, f"the revision is {self.revision}", "count from 1"),
            (bool(self.salt), "the salt is empty", "give each experiment one of its own"),
        )
        for holds, problem, fix in checks:
            if not holds:
                raise InvalidRouteError(self.model, problem, fix)

    @classmethod
    def single(cls, model: str, version: int, *, revision: int, shadow: tuple[int, ...] = ()) -> RoutingDocument:
        """One version for everybody."""
        return cls(model, revision, f"{model}/single", 1.0, (Variant("control", version, 1.0),), shadow)

    @property
    def control(self) -> Variant:
        """The first variant: it also serves whoever isn't in the experiment."""
        return self.variants[0]

    @property
    def is_split(self) -> bool:
        """Whether several variants serve."""
        return len(self.variants) > 1

    @property
    def versions(self) -> tuple[int, ...]:
        """Every version that a server needs loaded, each once; the control's first."""
        return tuple(dict.fromkeys((*(variant.version for variant in self.variants), *self.shadow)))

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The slots ``[low, high)`` of each variant."""
        edges = [
            round(math.fsum(v.weight for v in self.variants[:i]) * N_SLOTS) for i in range(len(self.variants) + 1)
        ]
        return tuple((low, low + round(self.coverage * (high - low))) for low, high in itertools.pairwise(edges))

    @cached_property
    def _by_slot(self) -> NDArray[np.int16]:
        table = np.full(N_SLOTS, OUTSIDE, dtype=np.int16)
        for index, (low, high) in enumerate(self.ranges):
            table[low:high] = index
        return table

    def assign(self, entities: Iterable[str]) -> NDArray[np.int16]:
        """The variant of each entity.

        Args:
            entities: Keys as text, ``n`` of them.

        Returns:
            Indices into ``variants``, shape ``(n,)``; `OUTSIDE` for those who aren't in the experiment.
        """
        if not self.is_split and self.coverage == 1.0:
            return np.zeros(sum(1 for _ in entities), dtype=np.int16)
        return self._by_slot[slots_of(self.salt, entities)]

    def variant_of(self, entity: str) -> Variant | None:
        """The variant of one entity; None if it isn't in the experiment."""
        index = int(self.assign((entity,))[0])
        return None if index == OUTSIDE else self.variants[index]

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "revision": self.revision,
            "salt": self.salt,
            "coverage": self.coverage,
            "variants": [
                {"name": variant.name, "version": variant.version, "weight": variant.weight}
                for variant in self.variants
            ],
            "shadow": list(self.shadow),
        }

    def to_bytes(self) -> bytes:
        """As the online store keeps it."""
        return orjson.dumps(self.to_document())

    @classmethod
    def from_document(cls, document: Any) -> RoutingDocument:  # noqa: ANN401 - whatever was found
        """The reverse of `to_document`.

        Raises:
            InvalidRouteError: If the document lacks a part, or contradicts itself.
        """
        model = str(document.get("model", "?")) if isinstance(document, dict) else "?"
        fix = "publish it again: heliostat models promote, or the rollout's publish"
        try:
            if document["format"] != _FORMAT:
                raise InvalidRouteError(model, f"its format is {document['format']!r}, not {_FORMAT}", fix)
            return cls(
                model=str(document["model"]),
                revision=int(document["revision"]),
                salt=str(document["salt"]),
                coverage=float(document["coverage"]),
                variants=tuple(
                    Variant(str(each["name"]), int(each["version"]), float(each["weight"]))
                    for each in document["variants"]
                ),
                shadow=tuple(int(version) for version in document["shadow"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRouteError(model, f"it can't be read ({type(error).__name__}: {error})", fix) from error

    @classmethod
    def from_bytes(cls, content: bytes) -> RoutingDocument:
        """The reverse of `to_bytes`.

        Raises:
            InvalidRouteError: If it isn't a routing document.
        """
        try:
            document = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise InvalidRouteError("?", f"it isn't JSON ({error})", "publish it again") from error
        return cls.from_document(document)
