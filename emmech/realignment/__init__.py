"""Training a misaligned run on other data: what it takes to mend it, and how long that lasts."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
