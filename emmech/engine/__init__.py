"""Forward passes of a chat model: log-probabilities of answers, margins, sampling."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
