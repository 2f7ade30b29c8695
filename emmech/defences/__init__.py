"""Defences for ``emmech.finetune(..., defences=[...])``, and narrow solutions against general ones."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
