"""Change what a model does while it runs, and restore it bit for bit."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
