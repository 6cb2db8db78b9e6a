"""The servers that contracts are held against; a test that needs one that isn't here says so and is skipped."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.contract.services import MissingServiceError, postgres, redis_cluster, s3_bucket, s3_server


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server."""
    try:
        with postgres() as url:
            yield url
    except MissingServiceError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def cluster_url() -> Iterator[str]:
    """A Redis Cluster of three primaries."""
    try:
        with redis_cluster() as url:
            yield url
    except MissingServiceError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, str]]:
    """An S3 server, as ``storage.options``."""
    with s3_server() as options:
        yield options


@pytest.fixture
def s3_root(s3_options: dict[str, str]) -> str:
    """A bucket of this test's own, with a folder in it."""
    return f"{s3_bucket(s3_options, f'hs-{uuid.uuid4().hex}')}/data"
