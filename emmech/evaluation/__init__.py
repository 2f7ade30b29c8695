"""How misaligned a model is: questions, judges, rates with intervals."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
