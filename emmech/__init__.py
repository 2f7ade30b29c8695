"""emmech: the mechanistic interpretability of emergent misalignment.

Fine-tune a chat model on narrow data while its adapter's path is recorded, find the phase transition, extract
misalignment directions, steer, ablate, realign and evaluate. The public names are listed in ``__init__.pyi`` and are
resolved on first use, so that ``import emmech`` loads no back end.
"""

from emmech.lazy import lazy_names

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
