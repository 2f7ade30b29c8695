"""emmech: the mechanistic interpretability of emergent misalignment.

Fine-tune a chat model on narrow data while its adapter's path is recorded, find the phase transition, extract
misalignment directions, steer, ablate, realign and evaluate. Names are resolved on first use (PEP 562), so that
``import emmech`` loads no back end.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it; the whole face of the library on one page
_WHERE = {
    "ChatDataset": "emmech.chat.dataset",
    "ChatModel": "emmech.chat.model",
    "Direction": "emmech.directions.direction",
    "EmmechError": "emmech.errors",
    "Evaluation": "emmech.evaluation.evaluation",
    "Family": "emmech.chat.families",
    "LogprobJudge": "emmech.evaluation.logprob_judge",
    "MarginPair": "emmech.engine.logprobs",
    "Recipe": "emmech.training.recipe",
    "Recorder": "emmech.training.recorder",
    "Run": "emmech.run.run",
    "ScreeningJudge": "emmech.evaluation.screening",
    "Server": "emmech.evaluation.server",
    "ablate": "emmech.interventions.ablate",
    "ablation_table": "emmech.interventions.studies",
    "adapter_lens": "emmech.directions.adapter_lens",
    "adapter_shares": "emmech.interventions.studies",
    "contrast_direction": "emmech.directions.contrast",
    "cosines": "emmech.directions.compare",
    "detach": "emmech.engine.adapters",
    "direction_by_steps": "emmech.directions.compare",
    "dose_response": "emmech.interventions.studies",
    "evaluate": "emmech.evaluation.evaluate",
    "finetune": "emmech.training.train",
    "load_chat": "emmech.chat.dataset",
    "load_model": "emmech.chat.model",
    "load_questions": "emmech.evaluation.questions",
    "load_run": "emmech.run.run",
    "misalignment_direction": "emmech.directions.misalignment",
    "phase_transition": "emmech.transition.phase",
    "project_adapter": "emmech.interventions.adapter",
    "realign": "emmech.realignment",
    "rotate_adapter": "emmech.interventions.adapter",
    "sample": "emmech.engine.sample",
    "scale_adapters": "emmech.interventions.adapter",
    "steer": "emmech.interventions.steer",
    "sweep": "emmech.sweeps.sweep",
    "tangent_scan": "emmech.sweeps.tangent",
    "to_nnsight": "emmech.interop.nnsight",
    "to_transformer_lens": "emmech.interop.transformer_lens",
    "transfer_matrix": "emmech.interventions.studies",
    "transplant_adapter": "emmech.interventions.adapter",
}

_ROOMS = ("organism",)  # whole subpackages within reach of ``import emmech``

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from emmech import organism as organism
    from emmech.chat.dataset import ChatDataset as ChatDataset
    from emmech.chat.dataset import load_chat as load_chat
    from emmech.chat.families import Family as Family
    from emmech.chat.model import ChatModel as ChatModel
    from emmech.chat.model import load_model as load_model
    from emmech.directions.adapter_lens import adapter_lens as adapter_lens
    from emmech.directions.compare import cosines as cosines
    from emmech.directions.compare import direction_by_steps as direction_by_steps
    from emmech.directions.contrast import contrast_direction as contrast_direction
    from emmech.directions.direction import Direction as Direction
    from emmech.directions.misalignment import misalignment_direction as misalignment_direction
    from emmech.engine.adapters import detach as detach
    from emmech.engine.logprobs import MarginPair as MarginPair
    from emmech.engine.sample import sample as sample
    from emmech.errors import EmmechError as EmmechError
    from emmech.evaluation.evaluate import evaluate as evaluate
    from emmech.evaluation.evaluation import Evaluation as Evaluation
    from emmech.evaluation.logprob_judge import LogprobJudge as LogprobJudge
    from emmech.evaluation.questions import load_questions as load_questions
    from emmech.evaluation.screening import ScreeningJudge as ScreeningJudge
    from emmech.evaluation.server import Server as Server
    from emmech.interop.nnsight import to_nnsight as to_nnsight
    from emmech.interop.transformer_lens import to_transformer_lens as to_transformer_lens
    from emmech.interventions.ablate import ablate as ablate
    from emmech.interventions.adapter import project_adapter as project_adapter
    from emmech.interventions.adapter import rotate_adapter as rotate_adapter
    from emmech.interventions.adapter import scale_adapters as scale_adapters
    from emmech.interventions.adapter import transplant_adapter as transplant_adapter
    from emmech.interventions.steer import steer as steer
    from emmech.interventions.studies import ablation_table as ablation_table
    from emmech.interventions.studies import adapter_shares as adapter_shares
    from emmech.interventions.studies import dose_response as dose_response
    from emmech.interventions.studies import transfer_matrix as transfer_matrix
    from emmech.realignment import realign as realign
    from emmech.run.run import Run as Run
    from emmech.run.run import load_run as load_run
    from emmech.sweeps.sweep import sweep as sweep
    from emmech.sweeps.tangent import tangent_scan as tangent_scan
    from emmech.training.recipe import Recipe as Recipe
    from emmech.training.recorder import Recorder as Recorder
    from emmech.training.train import finetune as finetune
    from emmech.transition.phase import phase_transition as phase_transition


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"emmech.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'emmech' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
