"""Cures of emergent misalignment compared, and the cures that train."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
