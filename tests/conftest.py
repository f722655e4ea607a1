"""What every test shares. Real clusters are fixtures of tests/integration."""

from hypothesis import settings

# Shared, slow machines: an example may take its time, the run may not.
settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")
