import pytest

from fedcore.engine.flower_private import Identity


@pytest.fixture(autouse=True)
def _identity():
    """Flower's messages need somebody who makes them."""
    with Identity(1, 1, 1).assumed():
        yield
