"""Both processes, closed, for all tests of identity in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from closed_pair import ClosedPair, closed_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedPair]:
    with closed_pair(tmp_path_factory.mktemp("identity")) as pair:
        yield pair
