"""Where tables lie: folders on a disk, or places in an object store."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.fs as pafs
from deltalake.exceptions import DeltaError
from deltalake.fs import DeltaStorageHandler

from heliostat.errors import TableUnavailableError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def absolute_root(root: str) -> str:
    """A root as every process understands it, whatever its working directory."""
    if root.startswith("file://"):
        root = root.removeprefix("file://")
    return root.rstrip("/") if "://" in root else str(Path(root).expanduser().absolute())


def joined(root: str, *parts: str) -> str:
    """A path below a root, which is a folder or a URL."""
    return "/".join([root.rstrip("/"), *parts])


def subfolders(root: str, options: Mapping[str, str], *parts: str) -> list[str]:
    """The names of the folders below a place, sorted; none if it isn't there.

    Raises:
        TableUnavailableError: If it can't be listed.
    """
    with reached(joined(root, *parts)):
        if "://" in root:
            filesystem = pafs.PyFileSystem(DeltaStorageHandler(root, dict(options)))
            found = filesystem.get_file_info(
                pafs.FileSelector("/".join(parts), allow_not_found=True, recursive=False)
            )
            return sorted(Path(each.path).name for each in found)
        folder = Path(root, *parts)
        return sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


@contextlib.contextmanager
def reached(uri: str) -> Iterator[None]:
    """Say of what fails in the block which place can't be reached.

    Raises:
        TableUnavailableError: If something does.
    """
    try:
        yield
    except (DeltaError, OSError) as error:
        raise TableUnavailableError(uri, one_line(error)) from error


def one_line(error: Exception) -> str:
    """A foreign error's text without line breaks and colours."""
    return " ".join(_COLOUR.sub("", str(error)).split())
