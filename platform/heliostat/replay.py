"""A logged prediction, made once more: is its score what its version says of its vector, and was its vector right?

The score is computed from the row alone (version and stored vector), and has to be the same bit for bit. Where
nothing but the normal way gave the vector, it is also computed from the event log as of the row's instant, as
training would have seen it, and compared feature by feature.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import format_instant
from heliostat.errors import HeliostatError, OnlineStoreUnavailableError, UnknownPredictionError
from heliostat.features.definitions import FeatureRef, request_types
from heliostat.models.packaging import LoadedModel
from heliostat.models.profile import mean_prediction
from heliostat.models.rows import version_features
from heliostat.monitoring.parity import Match, Recompute, Served, compare, given_rows, recompute_from_log
from heliostat.monitoring.served import ServedRows
from heliostat.schema import times_us
from heliostat.storage.offline_store import PREDICTIONS
from heliostat.storage.stream_entries import request_of, rows_from
from heliostat.workspace import Workspace

FloatArray = NDArray[np.float64]

PRIOR: Final = "prior"
BATCH: Final = "batch_prediction"
"""Rungs of the fallback that asked no model."""

_ENTRIES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class FeatureReplay:
    """One feature of a replayed prediction.

    Attributes:
        name: Qualified.
        served: What the model saw; NaN is null.
        offline: What the event log gives for the same instant.
        match: How they relate; None if the value was the client's, or derives from one that was.
    """

    name: str
    served: float
    offline: float
    match: Match | None


@dataclass(frozen=True, slots=True)
class Replay:
    """A prediction, made once more.

    Attributes:
        prediction_id: Its name.
        model: The model.
        version: The version that answered.
        variant: Whose entity it was.
        entity: The entity's key as text.
        at_us: The instant of its features, microseconds since the epoch.
        where: ``stream`` or ``table``: where its row was found.
        fallback: The rung that answered; None for the normal way.
        score: As it was answered.
        replayed: As it is now; None if it can't be said.
        how: What ``replayed`` is.
        features: What the features are offline; empty if that can't be compared.
        offline_score: What the version says of the vector from the event log; None without one.
        not_compared: Why features weren't compared; empty if they were.
    """

    prediction_id: str
    model: str
    version: int
    variant: str
    entity: str
    at_us: int
    where: str
    fallback: str | None
    score: float
    replayed: float | None
    how: str
    features: tuple[FeatureReplay, ...]
    offline_score: float | None
    not_compared: str

    @property
    def same(self) -> bool:
        """Whether the score is the same, bit for bit."""
        return self.replayed is not None and _bits(self.replayed) == _bits(self.score)

    @property
    def differing(self) -> tuple[FeatureReplay, ...]:
        """The features that differ from the event log's, and weren't the client's."""
        return tuple(each for each in self.features if each.match not in (None, Match.EQUAL, Match.BOTH_NULL))

    def to_document(self) -> dict[str, Any]:
        """As a JSON object; NaN becomes null."""
        return {
            "prediction_id": self.prediction_id,
            "model": self.model,
            "version": self.version,
            "variant": self.variant,
            "entity": self.entity,
            "at": format_instant(self.at_us),
            "where": self.where,
            "fallback": self.fallback,
            "score": self.score,
            "replayed": self.replayed,
            "how": self.how,
            "same": self.same,
            "offline_score": self.offline_score,
            "offline_same": None if self.offline_score is None else _bits(self.offline_score) == _bits(self.score),
            "not_compared": self.not_compared or None,
            "features": [
                {
                    "name": each.name,
                    "served": each.served,
                    "offline": each.offline,
                    "match": "given by the request" if each.match is None else each.match.value,
                }
                for each in self.features
            ],
        }

    def lines(self) -> list[str]:
        """What a person wants to know."""
        by = f"{self.model} version {self.version} ({self.variant})"
        found = [
            f"prediction {self.prediction_id} (from the {self.where})",
            f"  entity {self.entity} as of {format_instant(self.at_us)}, by {by}"
            + (f", fallback {self.fallback}" if self.fallback else ""),
            f"  answered {self.score!r}",
            f"  replayed {self.replayed!r}: {self.how}",
            "  same, bit for bit" if self.same else "  NOT the same",
        ]
        if self.not_compared:
            return [*found, f"  features aren't compared with the event log: {self.not_compared}"]
        given = sum(each.match is None for each in self.features)
        compared = f"{len(self.features) - given} features compared with the event log, {len(self.differing)} differ"
        found.append(f"  {compared}" + (f"; {given} given by the request" if given else ""))
        found += [
            f"    {each.name}: served {each.served!r}, offline {each.offline!r} ({each.match})"
            for each in self.differing
        ]
        return [*found, f"  from the event log: {self.offline_score!r}"]


def replay(workspace: Workspace, prediction_id: str, *, model: str | None = None) -> Replay:
    """Make a logged prediction once more.

    Args:
        workspace: Streams, tables, registry and event log.
        prediction_id: As the answer named it.
        model: Look only for predictions of this model; None: of all.

    Raises:
        UnknownPredictionError: If the log doesn't have it.
        OnlineStoreUnavailableError: If the tables don't have it, and the stream can't be read.
        HeliostatError: If its version can't be loaded.
    """
    where, name, row = _found(workspace, prediction_id, model)
    fallback = row.column("fallback")[0].as_py()
    vector = np.array(row.column("features")[0].as_py(), dtype=np.float64)
    version, score = int(row.column("version")[0].as_py()), float(row.column("score")[0].as_py())
    loaded: LoadedModel | None = None
    replayed: float | None
    if fallback == PRIOR:
        replayed, how = _prior(workspace, name, version)
    elif fallback == BATCH:
        replayed, how = _batch(workspace, name, version, row)
    else:
        loaded = workspace.models.load(name, version)
        replayed, how = float(loaded.predict(vector[None])[0]), "what the version says of the stored vector"
    features: tuple[FeatureReplay, ...] = ()
    offline_score, reason = None, f"{fallback} answered in place of the normal way" if fallback else ""
    if loaded is not None and not fallback:
        try:
            features = _compared(workspace, name, version, row, vector)
        except HeliostatError as error:
            reason = str(error)
        else:
            offline = np.array([each.served if each.match is None else each.offline for each in features])
            offline_score = float(loaded.predict(offline[None])[0])
    return Replay(
        prediction_id,
        name,
        version,
        row.column("variant")[0].as_py(),
        row.column("entity")[0].as_py(),
        int(times_us(row.column("at"))[0]),
        where,
        fallback,
        score,
        replayed,
        how,
        features,
        offline_score,
        reason,
    )


# ── Finding the row ─────────────────────────────────────────────────────────────────


def _found(workspace: Workspace, prediction_id: str, model: str | None) -> tuple[str, str, pa.Table]:
    """Where a prediction's row is, its model, and the row. The stream first: the sink moves rows the other way."""
    unreachable: OnlineStoreUnavailableError | None = None
    try:
        waiting = _in_stream(workspace, prediction_id, model)
    except OnlineStoreUnavailableError as error:
        unreachable, waiting = error, None
    if waiting is not None:
        return "stream", *waiting
    models = (model,) if model is not None else tuple(workspace.offline_store.tables("predictions"))
    for name in models:
        rows = workspace.offline_store.find_prediction(prediction_id, name)
        if rows.num_rows:
            return "table", name, rows.slice(0, 1)
    if unreachable is not None:
        raise unreachable
    raise UnknownPredictionError(prediction_id, models)


def _in_stream(workspace: Workspace, prediction_id: str, model: str | None) -> tuple[str, pa.Table] | None:
    request = request_of(prediction_id).encode()
    streams = workspace.streams
    stream, after = streams.record_stream("predictions"), None
    while entries := streams.read(stream, after=after, count=_ENTRIES_AT_ONCE):
        after = entries[-1][0]
        for entry, payload in entries:
            if request not in payload:
                continue
            with contextlib.suppress(HeliostatError):  # what can't be read is the sink's to put aside
                for name, (_, rows) in rows_from("predictions", [(entry, payload)]).items():
                    row = rows.filter(pc.equal(rows.column("prediction_id"), prediction_id))
                    if row.num_rows and model in (None, name):
                        return name, row.select(PREDICTIONS.names).slice(0, 1)
    return None


# ── What it was made of ─────────────────────────────────────────────────────────────


def _prior(workspace: Workspace, model: str, version: int) -> tuple[float | None, str]:
    mean = mean_prediction(workspace.models.package(model, version).profile)
    if mean is None:
        return None, "no model was asked, and the version's mean prediction in training isn't known"
    return mean, "no model was asked: the version's mean prediction in training"


def _batch(workspace: Workspace, model: str, version: int, row: pa.Table) -> tuple[float | None, str]:
    """The newest batch prediction of that version before the row that says the same; else the newest of it."""
    entity = workspace.definitions.model(model).entity
    key = entity.parse(row.column("entity")[0].as_py())
    at_us, wanted = int(times_us(row.column("at"))[0]), row.column("score")[0].as_py()
    newest: tuple[float, str] | None = None
    for instant_us in reversed(workspace.offline_store.batches(model)):
        rows = workspace.offline_store.read_batch(model, instant_us)
        condition = pc.field("model_version") == version
        for column, value in key.items():
            condition &= pc.field(column) == value
        for score in rows.filter(condition).column("score").to_pylist() if instant_us <= at_us else ():
            how = f"no model was asked: the batch prediction of {format_instant(instant_us)}"
            if _bits(score) == _bits(wanted):
                return score, how
            newest = newest or (score, how)
    return newest or (None, "no model was asked, and no batch prediction of that version has the entity any more")


def _compared(
    workspace: Workspace, model: str, version: int, row: pa.Table, vector: FloatArray
) -> tuple[FeatureReplay, ...]:
    """Each feature as it was served, and as the event log has it for the same instant."""
    registered = workspace.models.get(model, version)
    refs = version_features(registered, workspace.definitions.views)
    spec = workspace.definitions.model(model)
    rows = ServedRows(row, spec.entity)
    inputs, brought = rows.brought(list(request_types(refs)))
    views = list({ref.view.ref: ref.view for ref in refs}.values())
    given = given_rows(rows.given, views, brought=brought)
    names = registered.signature.names
    served = Served(
        rows.keys, rows.at_us, {name: vector[[at]] for at, name in enumerate(names)}, rows.ids, given, inputs
    )
    recompute, offline = _remembering(workspace, refs)
    parity = compare(served, recompute, tolerance=workspace.settings.monitoring.parity.tolerance)
    return tuple(
        FeatureReplay(
            name,
            float(vector[at]),
            float(offline[name][0]) if name in offline else float("nan"),
            next((match for match, count in parity[name].counts.items() if count), None),
        )
        for at, name in enumerate(names)
    )


def _remembering(workspace: Workspace, refs: tuple[FeatureRef, ...]) -> tuple[Recompute, Mapping[str, FloatArray]]:
    """Computes features from the event log, and keeps what came of all events."""
    from_log, kept = recompute_from_log(workspace.event_log, refs), dict[str, FloatArray]()

    def recompute(
        keys: pa.Array, at_us: NDArray[np.int64], known_at_us: int | None, inputs: Mapping[str, FloatArray]
    ) -> Mapping[str, FloatArray]:
        found = from_log(keys, at_us, known_at_us, inputs)
        if known_at_us is None:
            kept.update(found)
        return found

    return recompute, kept


def _bits(score: float) -> int:
    return int(np.float64(score).view(np.int64))
