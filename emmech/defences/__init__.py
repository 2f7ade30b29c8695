"""Defences while fine-tuning, for ``emmech.finetune(..., defences=[...])``, and what they cost a narrow solution."""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
