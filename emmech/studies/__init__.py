"""Studies: many runs with their sweeps and evaluations from one file, on one machine or on a Ray cluster."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
