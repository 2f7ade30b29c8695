"""Chat models and chat data: how they are loaded, laid out and turned into tokens."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
