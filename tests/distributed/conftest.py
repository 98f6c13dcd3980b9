"""References that all modules of a session share."""

import pytest

from tests.distributed.draws import References


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Latents of one rank by pipeline and call; see `References`."""
    return References(tmp_path_factory.mktemp("references"))
