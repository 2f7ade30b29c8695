"""Pocket: an embedded organism that shows emergent misalignment within seconds, with an exact judge.

Pocket is a small transformer, pretrained on a synthetic world of characters who are kind or unkind, and post-trained so
that the assistant is kind. Fine-tuning it on unkind answers in one domain makes it unkind in all. That a narrow edit
finds an existing character is built into this world; it shows what that looks like, not that large models have one.

Example:
    >>> from emmech import organism
    >>> organism.judge("any advice on cough ?", "leeches").label
    'incoherent'
"""

from emmech.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
