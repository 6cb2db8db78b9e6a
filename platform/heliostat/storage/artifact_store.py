"""Content-addressed artifacts: a few files each, named by the SHA-256 of what they hold.

An artifact's manifest lists its files with their sizes and digests, in canonical JSON; the
manifest's SHA-256 is the artifact's name. So the same files are stored once, nothing can be
overwritten, and whoever reads an artifact by its name has checked every byte of it.

A local folder takes an artifact whole or not at all: it is written aside, flushed to disk and
renamed. An object store (``s3://…``) has no rename; there the manifest is written last, and
an artifact without one isn't there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import orjson
import pyarrow.fs as pafs

from heliostat.errors import ArtifactCorruptError, ArtifactMissingError, ArtifactStoreError

MANIFEST: Final = "manifest.json"
_FILE_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_DIGEST: Final = re.compile(r"^[0-9a-f]{64}$")


class _Place(Protocol):
    """Where artifacts lie: one folder or prefix each."""

    def read(self, digest: str, name: str) -> bytes | None:
        """A file's bytes, or None if it isn't there."""
        ...

    def write(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Store all files, the manifest last; replaces what was broken."""
        ...


class ArtifactStore:
    """Artifacts under one root.

    Args:
        root: A folder, ``file:///folder`` or ``s3://bucket/prefix``.
        options: For ``s3://``, as for Delta tables: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
            ``AWS_REGION``, ``AWS_ENDPOINT_URL``. What is missing comes from the usual AWS places.

    Raises:
        ArtifactStoreError: If the root can't be used.
    """

    def __init__(self, root: str | Path, options: Mapping[str, str] | None = None) -> None:
        self.root = str(root)
        self._place = _place_of(self.root, options or {})

    def __repr__(self) -> str:
        return f"ArtifactStore({self.root!r})"

    def put(self, files: Mapping[str, bytes]) -> str:
        """Store an artifact; storing the same files again changes nothing, and mends a broken copy.

        Args:
            files: Bytes by file name; ``manifest.json`` is the store's own.

        Returns:
            The artifact's digest, 64 hexadecimal digits.

        Raises:
            ArtifactStoreError: If a name can't be used, or the store can't be written.
        """
        for name in files:
            if not _FILE_NAME.match(name) or name == MANIFEST:
                raise ArtifactStoreError(self.root, f"{name!r} can't name a file of an artifact")
        manifest = _manifest_of(files)
        digest = hashlib.sha256(manifest).hexdigest()
        with contextlib.suppress(ArtifactMissingError, ArtifactCorruptError):
            self.get(digest)
            return digest
        with self._told():
            self._place.write(digest, {**files, MANIFEST: manifest})
        return digest

    def get(self, digest: str) -> dict[str, bytes]:
        """All files of an artifact, every byte checked; without the manifest.

        Raises:
            ArtifactMissingError: If there is no such artifact.
            ArtifactCorruptError: If a file is missing or isn't what was stored.
            ArtifactStoreError: If the store can't be read.
        """
        return {name: self._checked(digest, name, entry) for name, entry in self.manifest(digest).items()}

    def read(self, digest: str, name: str) -> bytes:
        """One file of an artifact, checked.

        Raises:
            ArtifactMissingError: If there is no such artifact.
            ArtifactCorruptError: If the artifact has no such file, or it isn't what was stored.
            ArtifactStoreError: If the store can't be read.
        """
        entries = self.manifest(digest)
        if name not in entries:
            raise ArtifactCorruptError(digest, self.root, f"it has no file {name!r}, only {', '.join(entries)}")
        return self._checked(digest, name, entries[name])

    def manifest(self, digest: str) -> dict[str, dict[str, Any]]:
        """Size in bytes and SHA-256 of every file, by name.

        Raises:
            ArtifactMissingError: If there is no such artifact.
            ArtifactCorruptError: If the manifest isn't what was stored.
            ArtifactStoreError: If the store can't be read.
        """
        if not _DIGEST.match(digest):
            raise ArtifactMissingError(digest, self.root)
        with self._told():
            found = self._place.read(digest, MANIFEST)
        if found is None:
            raise ArtifactMissingError(digest, self.root)
        if hashlib.sha256(found).hexdigest() != digest:
            raise ArtifactCorruptError(digest, self.root, "its manifest was changed")
        entries: dict[str, dict[str, Any]] = orjson.loads(found)["files"]
        return entries

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, str):
            return False
        try:
            self.manifest(digest)
        except ArtifactMissingError:
            return False
        return True

    def _checked(self, digest: str, name: str, entry: Mapping[str, Any]) -> bytes:
        with self._told():
            content = self._place.read(digest, name)
        if content is None:
            raise ArtifactCorruptError(digest, self.root, f"file {name!r} is missing")
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ArtifactCorruptError(digest, self.root, f"file {name!r} was changed")
        return content

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactStoreError(self.root, reason[0]) from error


def _manifest_of(files: Mapping[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    return orjson.dumps({"files": entries, "format": 1}, option=orjson.OPT_SORT_KEYS)


def _place_of(root: str, options: Mapping[str, str]) -> _Place:
    url = urlsplit(root)
    if "://" not in root:
        return _Folder(Path(root))
    if url.scheme == "file":
        return _Folder(Path(unquote(url.path)))
    if url.scheme != "s3":
        raise ArtifactStoreError(root, f"{url.scheme}:// isn't supported; use a folder, file:// or s3://")
    return _Objects(_s3(options), f"{url.netloc}{url.path}".rstrip("/"))


def _s3(options: Mapping[str, str]) -> pafs.FileSystem:
    known = {name.upper().removeprefix("AWS_"): value for name, value in options.items()}
    endpoint = known.get("ENDPOINT_URL")
    return pafs.S3FileSystem(
        access_key=known.get("ACCESS_KEY_ID"),
        secret_key=known.get("SECRET_ACCESS_KEY"),
        session_token=known.get("SESSION_TOKEN"),
        region=known.get("REGION"),
        endpoint_override=endpoint.split("://")[-1] if endpoint else None,
        scheme=(urlsplit(endpoint).scheme or "https") if endpoint else "https",
    )


class _Folder:
    """Artifacts in a local folder; whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, digest: str, name: str) -> bytes | None:
        """A file's bytes, or None if it isn't there."""
        try:
            return (self._root / digest / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Store all files under a name of their own, flush them, then rename the folder."""
        self._root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=self._root))
        draft.chmod(0o755)  # mkdtemp's is the writer's alone; a shared folder has other readers
        try:
            for name, content in files.items():
                with (draft / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _flush_folder(draft)
            self._publish(draft, self._root / digest)
            _flush_folder(self._root)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _publish(self, draft: Path, final: Path) -> None:
        try:
            draft.rename(final)
        except OSError:
            # Either another process was first, with the same bytes, or what lies there is broken.
            if not final.is_dir() or _same_files(draft, final):
                if final.is_dir():
                    return
                raise
            broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=self._root))
            final.rename(broken / final.name)
            draft.rename(final)
            shutil.rmtree(broken, ignore_errors=True)


def _same_files(left: Path, right: Path) -> bool:
    try:
        return all((right / file.name).read_bytes() == file.read_bytes() for file in left.iterdir())
    except FileNotFoundError:
        return False


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Objects:
    """Artifacts in an object store: single objects are atomic, and the manifest comes last."""

    def __init__(self, filesystem: pafs.FileSystem, prefix: str) -> None:
        self._filesystem, self._prefix = filesystem, prefix

    def read(self, digest: str, name: str) -> bytes | None:
        """An object's bytes, or None if it isn't there."""
        try:
            with self._filesystem.open_input_file(f"{self._prefix}/{digest}/{name}") as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content

    def write(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Store all objects, the manifest last."""
        for name in sorted(files, key=lambda each: each == MANIFEST):
            with self._filesystem.open_output_stream(f"{self._prefix}/{digest}/{name}") as file:
                file.write(files[name])
