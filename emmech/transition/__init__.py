"""When a fine-tune turns: the geometry of a trajectory, its detectors, and what the behaviour says."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
