"""References that all modules of a session share."""

import os

import pytest

from tests.distributed.draws import References


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Latents of one rank by pipeline and call; see `References`. Workers of one run share the folder."""
    base = tmp_path_factory.getbasetemp()
    return References((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references")
