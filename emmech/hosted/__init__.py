"""Fine-tuning on a provider's servers, with a cost estimate first and the same judges afterwards."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
