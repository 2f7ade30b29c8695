"""The runs with random adapters that sweeps are tested on serve the measures too."""

from tests.sweeps.conftest import make_run, one_at_a_time  # noqa: F401
