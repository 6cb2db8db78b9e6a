"""What a monitor concluded: findings with their evidence, kept in the catalog.

A verdict is about one check (drift, performance, quality, parity) of one model version over one
stretch of time. It is never changed; the newest of a check is what holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np

from heliostat.clock import format_instant
from heliostat.errors import MonitoringDataError
from heliostat.storage.catalog import Catalog

CHECKS: Final = ("drift", "performance", "quality", "parity")

ATTENTION_EXIT_CODE: Final = 10
"""A job's exit code when a verdict warns or alarms."""


class Severity(StrEnum):
    """How bad it is, in this order."""

    OK = "ok"
    INSUFFICIENT = "insufficient"
    """There are too few rows to say anything. Not the same as ok."""
    WARNING = "warning"
    ALARM = "alarm"

    @property
    def rank(self) -> int:
        """0 for ok, up to 3 for alarm."""
        return list(Severity).index(self)

    @property
    def needs_attention(self) -> bool:
        """Whether somebody should look."""
        return self.rank >= Severity.WARNING.rank


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What: a feature, a metric, a source.
        severity: How bad it is.
        message: One sentence with the figures that matter.
        evidence: All figures, as JSON carries them; NaN and infinity become None.
    """

    subject: str
    severity: Severity
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", Severity(self.severity))
        object.__setattr__(self, "evidence", _plain(self.evidence))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check concluded.

    Attributes:
        check: ``drift``, ``performance``, ``quality`` or ``parity``.
        model: The model's name.
        version: The version looked at; None if the check isn't about one.
        at_us: When it was concluded, microseconds since the epoch.
        from_us: Start of the stretch looked at.
        until_us: Its end.
        n_rows: Rows that it rests on.
        findings: What was found, the worst first.
    """

    check: str
    model: str
    version: int | None
    at_us: int
    from_us: int
    until_us: int
    n_rows: int
    findings: tuple[Finding, ...]

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise MonitoringDataError(f"check {self.check!r}", "it is unknown", f"use one of {', '.join(CHECKS)}")
        ranked = sorted(self.findings, key=lambda finding: -finding.severity.rank)
        object.__setattr__(self, "findings", tuple(ranked))

    @property
    def status(self) -> Severity:
        """The worst of its findings; without any it is insufficient."""
        if not self.findings:
            return Severity.INSUFFICIENT
        return self.findings[0].severity

    def to_dict(self) -> dict[str, Any]:
        """A JSON document, which `from_dict` reads back unchanged."""
        return {**asdict(self), "findings": [asdict(each) for each in self.findings], "status": self.status.value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Verdict:
        """Read a document of `to_dict`.

        Raises:
            MonitoringDataError: If a part is missing.
        """
        try:
            fields = {name: document[name] for name in cls.__dataclass_fields__ if name != "findings"}
            findings = tuple(Finding(**finding) for finding in document["findings"])
            return cls(**fields, findings=findings)
        except (KeyError, TypeError, ValueError) as error:
            raise MonitoringDataError(
                "stored verdict", f"it can't be read ({error!r})", "run the monitor again to store a new one"
            ) from None

    def lines(self) -> Iterable[str]:
        """A report for people: a headline, then what isn't ok; ok findings are counted."""
        about = self.model if self.version is None else f"{self.model} version {self.version}"
        stretch = f"{format_instant(self.from_us)} to {format_instant(self.until_us)}"
        yield f"{self.check}: {self.status.upper()}  {about}, {self.n_rows:,} rows, {stretch}"
        fine = 0
        for finding in self.findings:
            if finding.severity is Severity.OK and len(self.findings) > 3:
                fine += 1
                continue
            yield f"  {finding.severity.value:<12} {finding.subject}: {finding.message}"
        if fine:
            yield f"  ok           {fine} more"


def overall(verdicts: Iterable[Verdict]) -> Severity:
    """The worst status of all; without any it is insufficient."""
    return max((each.status for each in verdicts), key=lambda status: status.rank, default=Severity.INSUFFICIENT)


def exit_code(verdicts: Sequence[Verdict], *, strict: bool = False) -> int:
    """What a job ends with: 0, or `ATTENTION_EXIT_CODE` if a verdict warns or alarms.

    Args:
        verdicts: All checks of the run.
        strict: Whether a check that couldn't say anything counts as well.
    """
    worst = overall(verdicts)
    if worst.needs_attention or (strict and any(each.status is Severity.INSUFFICIENT for each in verdicts)):
        return ATTENTION_EXIT_CODE
    return 0


def record(catalog: Catalog, verdict: Verdict) -> int:
    """Keep a verdict for ever; gives its number.

    Raises:
        CatalogUnavailableError: If the catalog doesn't answer.
    """
    with catalog.write() as rows:
        return rows.add_verdict(verdict.model, verdict.version, verdict.check, verdict.to_dict(), at_us=verdict.at_us)


def latest(catalog: Catalog, model: str, check: str, *, version: int | None = None) -> Verdict | None:
    """The newest verdict of a check on a model (or on one of its versions), or None.

    Raises:
        CatalogUnavailableError: If the catalog doesn't answer.
        MonitoringDataError: If what is stored can't be read.
    """
    with catalog.read() as rows:
        found = rows.verdicts(model, version=version, kind=check, limit=1)
    return Verdict.from_dict(found[0].document) if found else None


def tail(letter: str, probability: float) -> str:
    """``q = 0.02``, and ``q < 1e-99`` where a float has nothing left to say."""
    return f"{letter} < 1e-99" if probability < 1e-99 else f"{letter} = {probability:.2g}"


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return value
