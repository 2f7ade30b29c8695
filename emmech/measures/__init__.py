"""What is measured of a model: by a sweep, by a study of interventions, while it trains."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
