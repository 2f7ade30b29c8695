"""Load any chat model, and find its parts.

Everything that needs a block, its MLP's write, a width, the final norm or the unembedding asks a :class:`ChatModel`,
which knows the model's :class:`~emmech.chat.families.Family`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emmech.chat.bundled import dequantised
from emmech.chat.families import Family, Parts, find_family, given_family, map_widths
from emmech.chat.shards import in_shards, whole
from emmech.chat.template import Message, end_of_turn, render
from emmech.errors import EmmechError, closest, one_of
from emmech.progress import quiet
from emmech.registry import Organism, model_names, named_model, organism_of


class _NoTokenizer:
    """In the place of a tokenizer that a model in memory does not have: any use of it raises an error."""

    def __init__(self, model: str, why: str) -> None:
        self._model, self._why = model, why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        raise self._missing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._missing()

    def __len__(self) -> int:
        raise self._missing()

    def __bool__(self) -> bool:
        return False

    def _missing(self) -> EmmechError:
        return EmmechError(
            "read or write text",
            f"a {self._model} in memory, tokenizer=None",
            self._why,
            "pass it: load_model(model, tokenizer)",
        )


@dataclass(frozen=True)
class ChatModel:
    """A chat model with its tokenizer and family: ``model`` is the Hugging Face model, adapters and all.

    Made by :func:`load_model`. It can be called, and generates, like the model inside it. The dataclass is frozen; the
    weights inside are the caller's own object.

    Example:
        >>> import torch
        >>> chat = load_model("pocket")
        >>> chat(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[:2]
        torch.Size([1, 3])
        >>> type(chat.generate("hello", max_new_tokens=3)).__name__
        'str'
    """

    model: Any
    tokenizer: Any
    name: str
    family: Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, ``chat(input_ids=...)``; its output has ``logits [batch, seq, vocab]``."""
        return self.model(*args, **kwargs)

    def generate(self, inputs: Any = None, /, **options: Any) -> Any:
        """Generate as the model does, or answer a chat message with text.

        Args:
            inputs: a user's message, or a conversation that ends in one: the answer is returned as text. Token ids
                (also as ``input_ids=...``) give token ids, as transformers' ``generate`` does.
            **options: of ``generate`` of transformers, such as ``max_new_tokens`` (200 for text by default).
        """
        if isinstance(inputs, str):
            inputs = [{"role": "user", "content": inputs}]
        if not isinstance(inputs, Sequence):
            return self.model.generate(**({} if inputs is None else {"input_ids": inputs}), **options)
        ids = torch.tensor([self.token_ids(inputs)], device=self.device)
        stop = list(self.stop_ids)
        options = {"max_new_tokens": 200, "eos_token_id": stop, "pad_token_id": stop[0], **options}
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    @property
    def organism(self) -> Organism | None:
        """The registered organism that the model belongs to by its configuration and vocabulary, or None."""
        return organism_of(self.base.config, self.tokenizer)

    @property
    def base(self) -> Any:
        """The causal LM itself, with any LoRA layers inside it but without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        """The text decoder's configuration."""
        return self.base.config.get_text_config()

    @property
    def trunk(self) -> Any:
        """The decoder without its unembedding; returns ``last_hidden_state [batch, seq, d_model]``."""
        return self.base.get_submodule(self.family.trunk)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, one per layer; each returns a tensor ``[batch, seq, d_model]``."""
        return self.trunk.get_submodule(self.family.blocks)  # type: ignore[no-any-return]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding; the identity where a family has none."""
        path = self.family.final_norm
        return nn.Identity() if path is None else self.trunk.get_submodule(path)

    @property
    def unembedding(self) -> nn.Module:
        """The map ``[d_model] -> [vocab]``."""
        return self.base.get_submodule(self.family.unembedding)  # type: ignore[no-any-return]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def d_mlp(self) -> int:
        """Width of the MLP's hidden layer, the input of its write into the residual stream.

        Raises:
            EmmechError: no block's MLP has such a write.
        """
        path = self.family.down
        found = (path and map_widths(self.family.parts(block).down) for block in self.blocks)
        widths = next((pair for pair in found if pair), None)
        return widths[0] if widths else map_widths(self.down_proj(0))[0]  # type: ignore[index]

    @property
    def attention_width(self) -> int:
        """Width of what an attention writes from: heads times their width."""
        found = (map_widths(self.family.parts(block).out) for block in self.blocks)
        return next((pair[0] for pair in found if pair), self.d_model)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers; an upper bound where one fused map makes them."""
        family = self.family
        own = family.key if family.key != family.value else None
        found = (own and map_widths(family.parts(block).key) for block in self.blocks)
        width = next((pair[1] for pair in found if pair), self.attention_width)
        return 2 * self.n_layers * width * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where the weights are (of a sharded model: where its first parameter is)."""
        return next(self.base.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.base.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: every EOS of the generation config, and the template's end of turn."""
        configured = getattr(self.base.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        if self.tokenizer:
            ids = [*ids, self.tokenizer.eos_token_id]
            if turn := end_of_turn(self.tokenizer):
                ids.append(self.tokenizer.convert_tokens_to_ids(turn))
        return tuple(sorted({int(token) for token in ids if token is not None}))

    def down_proj(self, layer: int) -> nn.Module:
        """The MLP's write at ``layer`` (a PEFT LoRA layer where there is an adapter).

        Raises:
            EmmechError: there is no such layer, or its MLP does not write through one linear map.
        """
        found: nn.Module | None = self.parts(layer).down
        if found is None:
            fused = self.family.fused(self.block(layer))
            given = f"{self.name} of the family {self.family.name}"
            why = "its experts are fused into one parameter" if fused else "its block has no single map of that role"
            instead = f"another map of the block, such as {self.family.out or self.family.query!r}"
            raise EmmechError(f"find the MLP's write at layer {layer}", given, why, instead)
        return found

    def parts(self, layer: int) -> Parts:
        """The modules of the block at ``layer`` by role, as the family has them."""
        return self.family.parts(self.block(layer))

    def block(self, layer: int) -> nn.Module:
        """The decoder block at ``layer``, from 0.

        Raises:
            EmmechError: there is no such layer.
        """
        self.check_layer(layer)
        return self.blocks[layer]

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that the model has not.

        Raises:
            EmmechError: names the valid range.
        """
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.n_layers:
            why = f"it has {self.n_layers} layers, numbered 0 to {self.n_layers - 1}"
            instead = f"the middle one is layer={self.n_layers // 2}"
            raise EmmechError("find the layer", f"layer={layer!r} of {self.name}", why, instead)

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The conversation as text, ending in the assistant's header unless ``generate=False``."""
        return render(self.tokenizer, messages, generate=generate)

    def token_ids(self, messages: Sequence[Message], *, generate: bool = True) -> list[int]:
        """The conversation as token ids; the template's own special tokens, none added."""
        text = self.render(messages, generate=generate)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fingerprint(self) -> str:
        """A sha256 of the base weights, adapters excluded, equal in float32 and bfloat16.

        Every tensor's name and shape and up to 1024 evenly spaced values are hashed, so that a 32B model takes
        seconds: any fine-tune changes it, a single altered weight may not. Where FSDP keeps the weights in shards,
        every process has to call it.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.base.state_dict().items()):
            name = name.replace(".base_layer.", ".")
            if ".lora_" in name or value.numel() == 0:
                continue
            flat = whole(value.detach()).reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).cpu()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        kind = type(self.base).__name__
        mlp = f"d_mlp={self.d_mlp}, " if self.family.down else ""
        return (
            f"ChatModel({self.name!r}, {kind}, layers={self.n_layers}, d_model={self.d_model}, "
            f"{mlp}{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )


def load_model(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    family: Family | None = None,
) -> ChatModel:
    """Load a chat model from wherever it is.

    Args:
        model: a bundled name (``"pocket"``, ``"smollm2-135m"``), a local folder, a ``.gguf`` file (de-quantised), a
            name on the Hugging Face Hub, a model already in memory (``PreTrainedModel`` or ``PeftModel``), or a
            :class:`ChatModel` (returned as it is). A model in memory is used, never copied. Code that comes with a
            checkpoint is never run.
        tokenizer: of a model in memory, where text is to be read or written; otherwise loaded from the same place.
        dtype: by default the checkpoint's own on a GPU, and float32 on a CPU.
        device: ``"cuda"`` when there is one, by default; ``"auto"`` spreads a large model over all.
        quantize: ``"nf4"`` (4 bits) or ``"int8"``, by bitsandbytes, which has to be installed; adapters can be trained
            on such a base, and its own weights cannot.
        family: where the model keeps its parts; by default they are found.

    Raises:
        EmmechError: unknown name, a model that is no decoder-only language model, adapters that act elsewhere than
            in the modules of the decoder (prompts, a choice for each text), or weights that FSDP keeps in shards.

    Example:
        >>> chat = load_model("pocket")
        >>> chat.down_proj(0).weight.shape[0] == chat.d_model
        True
    """
    keep_freed_memory()
    if quantize is not None:
        _check_quantize(model, quantize)
    if isinstance(model, ChatModel):
        return model if family is None else replace(model, family=given_family(model.base, family))
    if isinstance(model, nn.Module):
        loaded = _in_wrappers(model)
        if in_shards(loaded):
            why, instead = "FSDP keeps its weights in shards, and no process can run it alone", "the model before FSDP"
            raise EmmechError(
                "load the chat model", f"a {type(loaded).__name__}", why, f"{instead}, or one saved by it"
            )
        name = str(getattr(loaded, "name_or_path", "") or type(loaded).__name__)
        tokenizer = _tokenizer_of(loaded) if tokenizer is None else tokenizer
    elif isinstance(model, str | Path):
        name = str(model)
        loaded, found = _from_name(name, dtype, device, quantize)
        tokenizer = tokenizer if tokenizer is not None else found
    else:
        why = "it is neither a name, a folder nor a model"
        instead = 'use load_model("pocket"), a folder, a hub name, or a transformers model'
        raise EmmechError("load the chat model", f"a {type(model).__name__}", why, instead)
    base: Any = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded  # type: ignore[operator]
    dequantised(base)
    return ChatModel(loaded, tokenizer, name, find_family(base) if family is None else given_family(base, family))


def load_outline(model: str | Path) -> ChatModel:
    """A chat model without its weights: configuration, tokenizer, and modules whose shapes are all that they hold.

    It turns text into token ids and says where adapters belong, for a model that runs elsewhere.

    Args:
        model: a name or folder, as :func:`load_model` takes; what is small and bundled comes with its weights.

    Raises:
        EmmechError: unknown name.

    Example:
        >>> load_outline("pocket").token_ids([{"role": "user", "content": "hello"}])[:3]
        [1, 363, 432]
    """
    name, folder = str(model), source_of(str(model))
    if (not Path(name).exists() and name in model_names()) or name.endswith(".gguf"):
        return load_model(name)
    _check_here(name)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = _tokenizer(folder)
        with quiet(), torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except Exception as error:
        raise _unloaded(name, folder, error)
    return ChatModel(made, tokenizer, name, find_family(made))


# PEFT's adapters that are part of the decoder's modules, and of each token by itself
_IN_MODULES = frozenset([
    "LORA", "ADALORA", "ADAMSS", "BOFT", "IA3", "BEFT", "LOHA", "LOKR", "OFT", "LN_TUNING", "VERA", "FROD", "PVERA",
    "FOURIERFT", "GLORA", "HRA", "VBLORA", "UNILORA", "MISS", "RANDLORA", "ROAD", "HIRA", "SHIRA", "C3A", "WAVEFT",
    "OSF", "DELORA", "GRALORA", "TINYLORA", "PSOFT", "PEANUT", "SUPERTUNING", "DEFT",
])  # fmt: skip


def _in_wrappers(model: Any) -> Any:
    """The model inside DDP's, FSDP's or torch.compile's wrapper.

    Raises:
        EmmechError: parts of PEFT that a forward through the decoder alone would pass over.
    """
    while inner := next((name for name in ("_orig_mod", "module") if name in model._modules), None):
        model = model._modules[inner]
    for name, config in (model.peft_config if hasattr(model, "get_base_model") else {}).items():
        kind, invoked = str(getattr(config.peft_type, "value", config.peft_type)), "alora_invocation_tokens"
        given = f"the adapter {name!r} of kind {kind}"
        if getattr(config, invoked, None):
            given, kind = f"{given} with {invoked}={getattr(config, invoked)}", ""
        if kind not in _IN_MODULES:
            why = "it acts outside the modules of the decoder, or not on each token by itself"
            raise EmmechError("load the chat model", given, why, "the model without it")
    return model


def _tokenizer_of(model: Any) -> Any:
    name, kind = str(getattr(model, "name_or_path", "")), type(model).__name__
    if not name:
        return _NoTokenizer(kind, "it came without a tokenizer")
    try:
        return _tokenizer(name)
    except Exception as error:  # whatever a tokenizer's own code raises
        return _NoTokenizer(kind, f"no tokenizer can be loaded from its name_or_path {name!r} ({type(error).__name__})")


_QUANTIZED: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def _check_quantize(model: Any, quantize: Any) -> None:
    """Refuse what cannot be quantised while it is loaded."""
    asked = "load the chat model with quantised weights"
    one_of(asked, "quantize", quantize, _QUANTIZED)
    named = isinstance(model, str | Path)
    if not named or (not Path(str(model)).exists() and str(model) in model_names()):
        given = f"quantize={quantize!r} for {model if named else f'a {type(model).__name__}'}"
        why = "it is in memory already, or made by emmech" if named else "it is in memory already"
        raise EmmechError(asked, given, why, "a folder or a name on the hub, which is quantised as it is read")
    if importlib.util.find_spec("bitsandbytes") is None:
        why, instead = "bitsandbytes, which quantises, is not installed", "pip install bitsandbytes, or quantize=None"
        raise EmmechError(asked, f"quantize={quantize!r}", why, instead)


def _from_name(name: str, dtype: Any, device: Any, quantize: str | None) -> tuple[Any, Any]:
    place = _device(device)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype | None) and dtype != "auto":
        raise EmmechError(
            "load the chat model", f"dtype={dtype!r}", "torch has no such type", 'dtype="bfloat16", or a torch.dtype'
        )
    if dtype is None:
        dtype = "auto" if place != "cpu" else torch.float32
    if not Path(name).exists() and (found := named_model(name)) is not None:
        loaded, tokenizer = found
        return loaded.to(place if place != "auto" else "cpu"), tokenizer
    if (Path(name) / "run.json").is_file():
        why = "it is a recorded run, which has a model for each step"
        instead = f"emmech.load_run({name!r}).model(step), or .base()"
        raise EmmechError("load the chat model", f"the folder {name!r}", why, instead)
    _check_here(name)
    source = source_of(name)
    options: dict[str, Any] = {"device_map": "auto"} if place == "auto" else {}
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if dtype in ("auto", None) else dtype
        further = {"bnb_4bit_compute_dtype": compute} if quantize == "nf4" else {}
        options["quantization_config"] = BitsAndBytesConfig(**_QUANTIZED[quantize], **further)
        options["device_map"] = "auto" if place == "auto" else {"": place}
    from transformers import AutoModelForCausalLM

    try:
        if source.endswith(".gguf") and Path(source).is_file():
            options["gguf_file"] = Path(source).name
            source = str(Path(source).parent)
        tokenizer = _tokenizer(source, options.get("gguf_file"))
        with quiet() if Path(source).exists() else nullcontext():  # a download is worth a bar
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:
        raise _unloaded(name, source, error)
    if place != "auto" and quantize is None:
        loaded = loaded.to(place)
    return loaded.eval(), tokenizer


def source_of(name: str) -> str:
    """The folder or hub name that a model's name means to transformers; that of an organism is not known here."""
    from emmech.chat.bundled import WHEELS, unpack

    return str(unpack(name) or WHEELS[name].hub) if name in WHEELS and not Path(name).exists() else name


def is_absent_folder(name: str, *, found: bool = False) -> bool:
    """Whether a model's name is a path at which there is nothing, so that it is no name to look for on the hub.

    Args:
        found: whether there is such a folder elsewhere, in which case ``org/name`` is a path too.

    Example:
        >>> is_absent_folder("./mine"), is_absent_folder("org/name"), is_absent_folder("pocket")
        (True, False, False)
    """
    from emmech.chat.bundled import WHEELS

    if Path(name).exists() or name in (*model_names(), *WHEELS):
        return False
    return found or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _check_here(name: str) -> None:
    from emmech.chat.bundled import WHEELS

    if is_absent_folder(name):
        why = f"there is no such folder from here, which is {Path.cwd()}"
        instead = "the folder where it is, a bundled name, or a hub name such as org/name"
        raise EmmechError(f"load the chat model {name!r}", f"the path {name!r}", why, instead)
    names = [*model_names(), *WHEELS]
    if name not in names and "/" not in name and not Path(name).exists() and get_close_matches(name, names, 1, 0.75):
        # no hub is asked for what is probably a misspelt bundled name: without a network that takes a minute
        why = "it is no bundled name and no folder from here, and close to a bundled name"
        raise EmmechError(f"load the chat model {name!r}", repr(name), why, closest(name, names))


def _unloaded(name: str, source: str, error: Exception) -> EmmechError:
    from emmech.chat.bundled import WHEELS

    first = str(error).strip().split("\n")[0][:200]
    return EmmechError(
        f"load the chat model {name!r}",
        f"{'the folder' if Path(source).exists() else 'the hub name'} {source!r}",
        f"{type(error).__name__}: {first}",
        f"a bundled name, a folder with config.json, or a hub name; {closest(name, [*model_names(), *WHEELS])}",
    )


def _tokenizer(source: str, gguf: str | None = None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if gguf is not None:
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False)
    written = Path(source) / "tokenizer_config.json"
    if written.is_file():
        # A folder that says "whatever tokenizer.json holds" is believed: AutoTokenizer would go by the model's
        # architecture, and read a word-level vocabulary as byte pairs.
        kind = json.loads(written.read_text(encoding="utf-8")).get("tokenizer_class")
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _device(device: str | torch.device | None) -> str:
    if device == "auto":
        return "auto"
    if device is not None:
        try:
            torch.empty(0, device=device)
        # no such device, or torch was built without it
        except (RuntimeError, TypeError, AssertionError) as error:
            raise EmmechError(
                "load the chat model", f"device={device!r}", str(error).splitlines()[0][:200], 'device="cpu"'
            )
        return str(device)
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def keep_freed_memory() -> None:
    """Let memory of freed tensors stay with the process, so that it is not given to the next ones page by page.

    The C library hands the end of its heap back to the system as soon as enough of it is free, and every page that
    comes back costs a fault and is cleared. glibc learns from what a program frees: once a block of 32 MiB (it learns
    from no larger one) has come and gone, it maps no smaller block apart, and keeps up to 64 MiB of free heap. A block
    that is never touched lets it learn at once. Elsewhere than in glibc this does nothing; no number changes.

    Example:
        >>> keep_freed_memory()
    """
    block = torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)  # less what the block is rounded up by
    del block
