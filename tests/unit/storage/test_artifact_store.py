from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import ArtifactCorruptError, ArtifactMissingError, ArtifactStoreError
from heliostat.storage import artifact_store
from heliostat.storage.artifact_store import MANIFEST, ArtifactStore

FILES = {"model.txt": b"tree\n", "signature.json": b'{"features":[]}'}


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A local folder; and the way of object stores, over a file system that can't rename."""
    if request.param == "folder":
        return ArtifactStore(tmp_path / "artifacts")
    (tmp_path / "artifacts").mkdir()
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())

    class Bucket(artifact_store._Objects):
        def write(self, digest: str, files: dict[str, bytes]) -> None:  # a folder must exist, a prefix needn't
            (tmp_path / "artifacts" / digest).mkdir(exist_ok=True)
            super().write(digest, files)

    monkeypatch.setattr(artifact_store, "_place_of", lambda *_: Bucket(bucket, "artifacts"))
    return ArtifactStore(str(tmp_path / "artifacts"))


def _file(store: ArtifactStore, digest: str, name: str) -> Path:
    return Path(store.root) / digest / name


def test_what_is_stored_comes_back(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    assert store.get(digest) == FILES
    assert store.read(digest, "model.txt") == b"tree\n"
    assert digest in store


def test_the_same_files_have_the_same_digest_in_any_order(store: ArtifactStore) -> None:
    assert store.put(FILES) == store.put(dict(reversed(FILES.items())))


def test_the_digest_is_part_of_the_storage_format(store: ArtifactStore) -> None:
    content = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"  # sha256 of "1"
    manifest = f'{{"files":{{"a":{{"bytes":1,"sha256":"{content}"}}}},"format":1}}'
    assert store.put({"a": b"1"}) == hashlib.sha256(manifest.encode()).hexdigest()


@given(
    left=st.dictionaries(st.sampled_from(["a", "b", "ab"]), st.binary(max_size=3), min_size=1),
    right=st.dictionaries(st.sampled_from(["a", "b", "ab"]), st.binary(max_size=3), min_size=1),
)
def test_two_artifacts_share_a_digest_only_if_they_are_the_same(
    left: dict[str, bytes], right: dict[str, bytes]
) -> None:
    same = artifact_store._manifest_of(left) == artifact_store._manifest_of(right)
    assert same == (left == right)


def test_a_changed_byte_is_found(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    _file(store, digest, "model.txt").write_bytes(b"tree!")
    with pytest.raises(ArtifactCorruptError, match=r"model\.txt.*was changed"):
        store.get(digest)
    assert store.read(digest, "signature.json") == FILES["signature.json"]


def test_a_changed_manifest_is_found(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    file = _file(store, digest, MANIFEST)
    file.write_bytes(file.read_bytes().replace(b"model.txt", b"other.txt"))
    with pytest.raises(ArtifactCorruptError, match="manifest was changed"):
        store.get(digest)


def test_a_file_that_has_gone_is_found(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    _file(store, digest, "model.txt").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"model\.txt.*is missing"):
        store.get(digest)


def test_storing_again_mends_a_broken_copy(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    _file(store, digest, "model.txt").write_bytes(b"tree!")
    assert store.put(FILES) == digest
    assert store.get(digest) == FILES


def test_an_artifact_whose_manifest_was_never_written_is_not_there(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    _file(store, digest, MANIFEST).unlink()
    assert digest not in store
    with pytest.raises(ArtifactMissingError):
        store.get(digest)
    assert store.put(FILES) == digest
    assert store.get(digest) == FILES


@pytest.mark.parametrize("digest", ["0" * 64, "../../etc", ""])
def test_an_unknown_digest_is_missing(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(ArtifactMissingError, match="train again"):
        store.get(digest)
    assert digest not in store


def test_a_file_that_the_artifact_does_not_have_is_told(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    with pytest.raises(ArtifactCorruptError, match=r"no file 'profile\.json', only model\.txt, signature\.json"):
        store.read(digest, "profile.json")


@pytest.mark.parametrize("name", ["../model.txt", "a/b", "", ".hidden", MANIFEST])
def test_a_name_that_leaves_the_artifact_is_refused(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ArtifactStoreError, match="can't name a file"):
        store.put({name: b""})


def test_a_folder_holds_whole_artifacts_and_no_drafts(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/my%20artifacts")
    digests = {store.put({"a": bytes([i])}) for i in range(3)}
    assert {path.name for path in (tmp_path / "my artifacts").iterdir()} == digests


def test_a_crash_before_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: Path) -> None:
        raise KeyboardInterrupt

    store = ArtifactStore(tmp_path)
    monkeypatch.setattr(artifact_store, "_flush_folder", crash)
    with pytest.raises(KeyboardInterrupt):
        store.put(FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ArtifactStoreError, match=r"storage\.root"):
        ArtifactStore("/proc/nowhere").put(FILES)


def test_a_scheme_that_is_not_supported_is_refused() -> None:
    with pytest.raises(ArtifactStoreError, match="s3://"):
        ArtifactStore("gs://bucket/artifacts")
