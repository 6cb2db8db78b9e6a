"""The third stage of a prediction: scores of rows, by any version of any model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightgbm  # noqa: F401 - imported before the first request: loading a version would wait for it
import numpy as np
from numpy.typing import NDArray

from heliostat.errors import ModelTooLargeError
from heliostat.models.packaging import LoadedModel
from heliostat.serving.lanes import Lane, in_thread
from heliostat.serving.telemetry import Board

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")

# A call on the event loop holds up everybody: it should take no longer than this, and is at most so many rows.
_SHORT_S = 0.005
_ROWS_ON_THE_LOOP = 4096
# A version that took longer than this so often, against all expectation, gets no more calls there.
_TOO_LONG_S = 0.1
_SLOW_CALLS = 3
# So many calls with real features are made in a thread first: what hangs on them shows there, and holds up nobody.
_PROVING_CALLS = 32
_TRIAL_ROWS = 64


@dataclass(frozen=True, slots=True)
class ScoreQuery:
    """What to score.

    Attributes:
        model: The model's name.
        version: Which version of it.
        matrix: Shape ``(n, n_features)``, columns in the order of the version's signature.
        explain: Whether contributions are wanted instead of scores.
        beside: Whether nobody waits for it, so that it must hold up nobody: a shadow's.
    """

    model: str
    version: int
    matrix: FloatArray
    explain: bool = False
    beside: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """A loaded version.

    Attributes:
        lane: Its threads.
        rows_on_loop: More rows than this go to a thread.
        slow: How often the event loop was held up by it.
        proving: So many more calls with real features are to go well in a thread before one is made on the loop.
    """

    model: LoadedModel
    lane: Lane
    rows_on_loop: int
    slow: int = 0
    proving: int = _PROVING_CALLS


class ModelRunner:
    """Scores rows with any version of any model; keeps the versions that were used last.

    A version is tried in a thread when it is loaded: one that raises or hangs never gets further. What a row
    costs is measured then, and calls that are short enough are made on the event loop, since a thread would
    cost more than they do; all others in the version's own threads, so that nobody else waits for them. So are
    its first calls with real features, however short: those of the trial are nulls, and it may hang on others.

    Args:
        load: Gives a version, ready to predict; may block, and may raise.
        capacity_bytes: What all versions together may take, about.
        threads: Calls of a version in threads at once.
        isolated: Whether every call is made in a thread.
    """

    def __init__(
        self,
        load: Callable[[str, int], LoadedModel],
        *,
        capacity_bytes: int = 1 << 30,
        threads: int = 2,
        isolated: bool = False,
    ) -> None:
        self._load, self._capacity_bytes, self._threads, self._isolated = load, capacity_bytes, threads, isolated
        self._held: OrderedDict[tuple[str, int], _Held] = OrderedDict()
        self._loading: dict[tuple[str, int], asyncio.Task[_Held]] = {}
        self._hits = self._misses = 0

    def report(self, board: Board) -> None:
        """Put into numbers what is held, and how often it was what was asked for."""
        board.set("heliostat_models_loaded", value=len(self._held))
        board.set("heliostat_model_memory_bytes", value=self.bytes_held)
        board.set("heliostat_cache_total", "models", "hit", value=self._hits)
        board.set("heliostat_cache_total", "models", "miss", value=self._misses)

    @property
    def bytes_held(self) -> int:
        """What the loaded versions take, about."""
        return sum(held.model.package.memory_bytes for held in self._held.values())

    async def __call__(self, query: ScoreQuery) -> FloatArray:
        """Scores, shape ``(n,)``; or what they are made of, as `LoadedModel.contributions` gives it.

        Raises:
            HeliostatError: If the version can't be loaded, or the matrix doesn't fit its signature.
        """
        key = query.model, query.version
        if not (query.explain or query.beside):
            score = self.at_once(*key, len(query.matrix))
            if score is not None:
                return score(query.matrix)
        held = self._held.get(key)
        if held is None:
            self._misses += 1
            held = await self._loaded(key)
        else:
            self._hits += 1
            self._held.move_to_end(key)
        if query.explain:
            return await held.lane.call(held.model.contributions, query.matrix)
        scores = await held.lane.call(held.model.predict, query.matrix)
        if held.proving and not (query.beside or np.isnan(query.matrix).all()):
            held.proving -= 1
        return scores

    def at_once(self, model: str, version: int, rows: int) -> Callable[[FloatArray], FloatArray] | None:
        """What scores so many rows of a version on the event loop, if it may: a short call, and it has proved itself.

        It takes a matrix, gives scores of shape ``(rows,)``, and raises what `LoadedModel.predict` does.
        """
        held = self._held.get((model, version))
        if held is None or held.proving or rows > held.rows_on_loop:
            return None
        return partial(self._score_here, (model, version), held)

    def _score_here(self, key: tuple[str, int], held: _Held, matrix: FloatArray) -> FloatArray:
        self._hits += 1
        self._held.move_to_end(key)
        begin = time.perf_counter()
        scores = held.model.predict(matrix)
        if time.perf_counter() - begin > _TOO_LONG_S:
            self._note_slow(key, held)
        return scores

    async def loaded(self, model: str, version: int) -> LoadedModel:
        """A version, loaded once however many ask for it; loading goes on if they leave.

        Raises:
            HeliostatError: If it can't be loaded; the next who asks makes it try again.
        """
        return (await self._loaded((model, version))).model

    async def _loaded(self, key: tuple[str, int]) -> _Held:
        held = self._held.get(key)
        if held is not None:
            return held
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load_once(key))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    async def _load_once(self, key: tuple[str, int]) -> _Held:
        model, row_s = await in_thread(self._tried, *key)
        size = model.package.memory_bytes
        if size > self._capacity_bytes:
            raise ModelTooLargeError(*key, size, self._capacity_bytes)
        rows = 0 if self._isolated else min(_ROWS_ON_THE_LOOP, int(_SHORT_S / row_s))
        held = self._held[key] = _Held(
            model, Lane("version {1} of model {0}".format(*key), at_once=self._threads), rows
        )
        while self.bytes_held > self._capacity_bytes:
            self._held.popitem(last=False)
        return held

    def _tried(self, model: str, version: int) -> tuple[LoadedModel, float]:
        """A version that has shown that it predicts, and what a row costs it, seconds."""
        loaded = self._load(model, version)
        matrix = np.full((_TRIAL_ROWS, len(loaded.signature.names)), np.nan)
        spent: list[float] = []
        for _ in range(3):  # the first call makes what later ones use
            begin = time.perf_counter()
            loaded.predict(matrix)
            spent.append(time.perf_counter() - begin)
        return loaded, max(min(spent) / _TRIAL_ROWS, 1e-9)

    def _note_slow(self, key: tuple[str, int], held: _Held) -> None:
        held.slow += 1
        if held.slow >= _SLOW_CALLS:
            held.rows_on_loop = 0
            _logger.warning("version %d of model %s is scored in threads from now on: it takes long", key[1], key[0])

    def _forget(self, key: tuple[str, int], done: asyncio.Task[_Held]) -> None:
        self._loading.pop(key, None)
        if not done.cancelled():
            done.exception()  # read, or asyncio complains when everybody who waited has left
