"""What misalignment is inside the model: directions, how to extract them, and how sure one can be of them."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
