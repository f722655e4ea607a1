"""What every test shares. Real clusters are fixtures of tests/integration."""

import pytest
from hypothesis import settings

# Shared, slow machines: an example may take its time, the run may not.
settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-requests",
        type=int,
        default=4000,
        metavar="N",
        help="Requests that the API is fuzzed with (`make fuzz`).",
    )
