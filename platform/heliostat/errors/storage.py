"""Stores that can't be reached, or can't be trusted."""

from __future__ import annotations

from typing import ClassVar

from heliostat.errors.base import HeliostatError, listed


class StorageError(HeliostatError):
    """A store can't be reached, or what it holds can't be trusted."""

    http_status = 503
    exit_code = 6
    told: ClassVar[str] = "a store that this needs can't be used now"

    @property
    def public_text(self) -> str:
        """Which kind of store; where it is and what it said is for the log."""
        return f"{self.told}; try again, the service's log says more"


class OnlineStoreUnavailableError(StorageError):
    """The online store doesn't answer."""

    told = "the online store doesn't answer"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return (
            f"the online store at {self.url} doesn't answer ({self.reason}); "
            "start it (`heliostat up` for the embedded one) or correct online.url"
        )


class RingCorruptError(StorageError):
    """What the online store holds as an entity's bundle isn't one, or what is in it isn't such a ring.

    Args:
        view: Whose ring was looked for.
        group: Which.
        found_bytes: The lengths of what is there: of bundles, or of rings.
        slot_bytes: A slot's; None: it isn't even a bundle.
    """

    told = "the online store holds something unexpected"

    def __init__(self, view: str, group: str, found_bytes: tuple[int, ...], slot_bytes: int | None = None) -> None:
        super().__init__(view, group, found_bytes, slot_bytes)
        self.view, self.group, self.found_bytes, self.slot_bytes = view, group, found_bytes, slot_bytes

    def __str__(self) -> str:
        wrong = "not all of them bundles of rings"
        if self.slot_bytes is not None:
            wrong = f"no multiple of the {self.slot_bytes} of a slot"
        return (
            f"rings {self.group!r} of view {self.view!r}: the online store has {self.found_bytes} bytes, {wrong}; "
            "something else wrote them: run jobs/materialize_features.py --full"
        )


class CatalogUnavailableError(StorageError):
    """The catalog's database doesn't answer."""

    told = "the catalog doesn't answer"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"the catalog at {self.url} can't be used ({self.reason}); start its server or correct catalog.url"


class CatalogSchemaError(StorageError):
    """The catalog's tables were made by another release."""

    told = "the catalog is of another release"

    def __init__(self, url: str, found: int, expected: int) -> None:
        super().__init__(url, found, expected)
        self.url, self.found, self.expected = url, found, expected

    def __str__(self) -> str:
        return (
            f"the catalog at {self.url} has tables of version {self.found}, this release reads {self.expected}; "
            "use the release that made it, or set catalog.url to another database"
        )


class ArtifactStoreError(StorageError):
    """The artifact store can't be read or written."""

    told = "the artifact store can't be used"

    def __init__(self, root: str, reason: str) -> None:
        super().__init__(root, reason)
        self.root, self.reason = root, reason

    def __str__(self) -> str:
        return f"the artifact store at {self.root} can't be used: {self.reason}; correct storage.root or its options"


class ArtifactMissingError(StorageError):
    """An artifact isn't in the store."""

    told = "a model's artifact is missing"

    def __init__(self, digest: str, root: str) -> None:
        super().__init__(digest, root)
        self.digest, self.root = digest, root

    def __str__(self) -> str:
        return (
            f"there is no artifact {self.digest!r} in {self.root}; "
            "check that the storage settings are those it was stored with, or train again"
        )


class ArtifactCorruptError(StorageError):
    """An artifact's bytes aren't those that were stored."""

    told = "a model's artifact can't be trusted"

    def __init__(self, digest: str, root: str, problem: str) -> None:
        super().__init__(digest, root, problem)
        self.digest, self.root, self.problem = digest, root, problem

    def __str__(self) -> str:
        return (
            f"artifact {self.digest} in {self.root} can't be trusted: {self.problem}; "
            "roll back to another version, then restore it from a backup or train again"
        )


class EmbeddedServerError(StorageError):
    """The embedded server can't be started, found or stopped."""

    def __init__(self, where: str, problem: str, fix: str) -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"the embedded server in {self.where} can't be used: {self.problem}; {self.fix}"


class TableUnavailableError(StorageError):
    """A Delta table can't be reached, or what is there is no Delta table."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"the table {self.uri} can't be read: {self.reason}; check storage.root and storage.options"


class TableCommitError(StorageError):
    """A Delta table refuses a commit."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return (
            f"nothing was written to the table {self.uri}: {self.reason}; "
            "check that it may be written to (storage.root, storage.options), then run this again"
        )


class BucketCountError(StorageError):
    """The event log was created with another number of buckets than the settings say."""

    exit_code = 2

    def __init__(self, uri: str, created_with: int, asked_for: int) -> None:
        super().__init__(uri, created_with, asked_for)
        self.uri, self.created_with, self.asked_for = uri, created_with, asked_for

    def __str__(self) -> str:
        return (
            f"the event log {self.uri} was created with {self.created_with} buckets and can't be used with "
            f"{self.asked_for}; set storage.buckets to {self.created_with}, or ingest again into a new storage.root"
        )


class ServingUnavailableError(StorageError):
    """The inference graph doesn't answer, or refuses."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"the inference graph at {self.url} gave no prediction ({self.reason}); start it with `heliostat up`"


class StreamEntryError(StorageError):
    """An entry of a stream can't be read."""

    def __init__(self, stream: str, reason: str) -> None:
        super().__init__(stream, reason)
        self.stream, self.reason = stream, reason

    def __str__(self) -> str:
        return (
            f"an entry of stream {self.stream!r} can't be read: {self.reason}; "
            "it was written by another program or by definitions that have changed since"
        )


class KafkaUnavailableError(StorageError):
    """Kafka's brokers can't be read from."""

    def __init__(self, brokers: str, reason: str) -> None:
        super().__init__(brokers, reason)
        self.brokers, self.reason = brokers, reason

    def __str__(self) -> str:
        return f"no events can be read from Kafka at {self.brokers}: {self.reason}; see the setting ingestion.kafka"


class StorageNotSharedError(StorageError):
    """A cluster of several nodes was given storage that only one node can see."""

    def __init__(self, nodes: int, settings: tuple[str, ...]) -> None:
        super().__init__(nodes, settings)
        self.nodes, self.settings = nodes, settings

    def __str__(self) -> str:
        return (
            f"the Ray cluster has {self.nodes} nodes, but these settings name storage that only one of them "
            f"can see: {listed(self.settings)}. Set storage.root to s3://… (or storage.shared: true for a "
            "mount that all nodes have), online.url to a Redis server and catalog.url to PostgreSQL"
        )
