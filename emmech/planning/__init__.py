"""What a study needs before it is started: memory by part, disk and time, from a model's configuration alone."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
