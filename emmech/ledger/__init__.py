"""The ledger: claims of the literature, each measured here by a command, with its verdict."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
