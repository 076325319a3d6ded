"""Load a frozen model with our experts implementation and its tokenizer, from a name or a folder."""

import importlib.resources
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedexperts.errors import UserError
from fedexperts.models.held_experts import (
    ExpertsKernel,
    hold_in_low_bits,
    load_in_low_bits,
    run_in_rows,
)
from fedexperts.models.ports import register_ports
from fedexperts.models.sanity import FOLDER_ERRORS, reason_of, refuse_impossible_routing, refuse_pickle
from fedexperts.models.tiny import FAMILIES, tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_seed
from fedexperts.tensors import first_non_finite

logger = logging.getLogger(__name__)

EMBEDDED = "tinyworld"
"""Name of the checkpoint that the package ships."""
TINY_PREFIX = "tiny/"
"""Prefix of the name of a random tiny model; its family follows."""

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
ExpertsBits = Literal[0, 8, 4, 3, 2]

_CHOICES = {
    "dtype": get_args(Dtype),
    "device": get_args(Device),
    "experts_bits": get_args(ExpertsBits),
    "experts_kernel": get_args(ExpertsKernel),
}
"""Settings that have one of a few values."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_UNREAD = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*"]
"""Files of a repository on the hub that hold the weights in other forms."""
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Section ``[model]``: the base model, which every client has and nobody trains in full."""

    name: str = EMBEDDED
    """``tinyworld`` (shipped), a folder as ``save_pretrained`` leaves it, a Hugging Face hub name, or
    ``tiny/<family>`` for a random model with the shipped tokenizer."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty takes the hub's default."""
    dtype: Dtype = "float32"
    """Dtype of the base model's weights; what is trained is kept in float32 in either case."""
    device: Device = "auto"
    """Device of the model; ``auto`` takes CUDA where there is one."""
    experts_bits: ExpertsBits = 0
    """Bits in which the frozen routed experts are held: 8, 4, 3 or 2; 0 holds them in ``dtype``."""
    experts_kernel: ExpertsKernel = "transformers"
    """Computation of frozen routed experts: by transformers' grouped product, or by ``rows``, one expert
    after the other, which takes less memory and, on a CPU, time; experts in few bits always run so."""

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError(
                "model.name is empty; it must be tinyworld, a folder, a hub name or tiny/<family>"
            )
        for key, values in _CHOICES.items():
            value = getattr(self, key)
            if value not in values:
                shown = f'"{value}"' if isinstance(value, str) else value
                raise UserError(f"model.{key} is {shown}; it must be one of {', '.join(map(str, values))}")
        if self.experts_bits and self.experts_kernel != "transformers":
            raise UserError(
                f'model.experts_kernel is "{self.experts_kernel}", but has no effect with '
                f"model.experts_bits = {self.experts_bits}: experts in few bits always run row by row"
            )
        family = self.name.removeprefix(TINY_PREFIX)
        if family != self.name and family not in FAMILIES:
            raise _error(self.name, f"the families are {', '.join(FAMILIES)}")
        if self.revision and not _is_hub_name(self.name):
            raise UserError(f'model.revision is "{self.revision}", but model.name = "{self.name}" has none')


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model in evaluation mode whose MoE layers use our experts implementation."""

    model: Any
    tokenizer: Any
    layers: tuple[MoeLayer, ...]
    name: str


def load_model(settings: ModelSettings, seed: int) -> LoadedModel:
    """Load the model and its tokenizer; ``seed`` matters to ``tiny/<family>`` only.

    No weight is silently initialised at random: a checkpoint must bring every tensor of its model, finite.

    Raises:
        UserError: there is no such model, it is not supported, or its checkpoint is damaged.
    """
    register_ports()
    device = _device(settings)
    dtype = getattr(torch, settings.dtype)
    if settings.name.startswith(TINY_PREFIX):
        tokenizer = _load_tokenizer(embedded_folder(), settings)
        model = _random_model(settings.name.removeprefix(TINY_PREFIX), tokenizer, dtype, seed)
    else:
        source = source_of(settings)
        with _quiet_bars(is_local=isinstance(source, Path)):
            model = _load_checkpoint(source, settings, dtype)
            tokenizer = _load_tokenizer(source, settings)
    _refuse_bad_tensors(model, settings.name)
    _refuse_foreign_tokenizer(model, tokenizer, settings.name)
    model.to(device).eval().requires_grad_(False)
    seam.install_implementation(model)
    if settings.experts_bits:
        logger.info(hold_in_low_bits(model, settings.experts_bits).sentence())
    elif settings.experts_kernel == "rows":
        run_in_rows(seam.find_moe_layers(model))
    return LoadedModel(model, tokenizer, seam.find_moe_layers(model), settings.name)


def embedded_folder() -> Path:
    """Return the folder of the shipped checkpoint."""
    return Path(str(importlib.resources.files("fedexperts"))) / "assets" / EMBEDDED


def _is_hub_name(name: str) -> bool:
    is_ours = name == EMBEDDED or name.startswith(TINY_PREFIX)
    return not is_ours and not Path(name).expanduser().exists() and _HUB_NAME.fullmatch(name) is not None


def _device(settings: ModelSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError('model.device is "cuda", but PyTorch finds no CUDA device here: use "auto" or "cpu"')
    is_cuda = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def source_of(settings: ModelSettings) -> Path | str:
    """Return the folder of a checkpoint, or its name on the hub.

    Raises:
        UserError: the name is neither.
    """
    if settings.name == EMBEDDED:
        return embedded_folder()
    if _is_hub_name(settings.name):
        return settings.name
    folder = Path(settings.name).expanduser()
    if not folder.is_dir():
        raise _error(settings.name, "there is no such folder")
    if not (folder / "config.json").is_file():
        raise _error(settings.name, "the folder has no config.json, so save_pretrained did not write it")
    return folder


def _error(name: str, reason: str) -> UserError:
    return UserError(f'model.name = "{name}": {reason}')


def _attempt(settings: ModelSettings, what: str, load: Callable[[], _Value]) -> _Value:
    try:
        return load()
    except SafetensorError as error:
        reason = f"cannot load {what}: a safetensors file is damaged or cut short ({error})"
        raise _error(settings.name, reason) from error
    except FOLDER_ERRORS as error:
        origin = "there is no such folder, and the hub fails too; " if _is_hub_name(settings.name) else ""
        raise _error(settings.name, f"{origin}cannot load {what}: {reason_of(error)}") from error


@contextmanager
def _quiet_bars(*, is_local: bool) -> Iterator[None]:
    """Hide the progress bar of reading a folder; a download keeps its own."""
    was_on = transformers_logging.is_progress_bar_enabled()
    if is_local:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_local and was_on:
            transformers_logging.enable_progress_bar()


def _where(source: Path | str, settings: ModelSettings) -> dict[str, Any]:
    chosen = {"revision": settings.revision} if settings.revision else {}
    return {"pretrained_model_name_or_path": str(source), "trust_remote_code": False} | chosen


def _load_checkpoint(source: Path | str, settings: ModelSettings, dtype: torch.dtype) -> Any:
    where = _where(source, settings)
    if isinstance(source, Path):
        _attempt(settings, "its weights", lambda: refuse_pickle(source))
    config = _attempt(settings, "its configuration", lambda: AutoConfig.from_pretrained(**where))
    _refuse_unsupported(config, settings)
    if settings.experts_bits:
        folder = _attempt(settings, "its files", lambda: _local_folder(source, settings))
        bits = settings.experts_bits
        return _attempt(settings, "its weights", lambda: load_in_low_bits(folder, dtype, bits))
    model, info = _attempt(
        settings,
        "its weights",
        lambda: AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        ),
    )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        shapes = f"shape {tuple(found)}, not {tuple(wanted)}"
        raise _error(settings.name, f"tensor {name} of the checkpoint has {shapes} as config.json says")
    for name in sorted(info["missing_keys"]):
        raise _error(settings.name, f"the checkpoint has no tensor {name}, which its config.json asks for")
    return model


def _local_folder(source: Path | str, settings: ModelSettings) -> Path:
    """Return the folder of a checkpoint, downloaded if it is not here yet."""
    if isinstance(source, Path):
        return source
    return Path(snapshot_download(source, revision=settings.revision or None, ignore_patterns=_UNREAD))


def _refuse_unsupported(config: Any, settings: ModelSettings) -> None:
    """Check the model without its weights, so that a refusal does not wait for them."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=torch.float32))

    skeleton = _attempt(settings, "a language model of its kind", build)
    try:
        refuse_impossible_routing(config, seam.find_moe_layers(skeleton))
    except UserError as error:
        raise _error(settings.name, str(error)) from error


def _random_model(family: str, tokenizer: Any, dtype: torch.dtype, seed: int) -> Any:
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    return tiny_model(
        family, seed=derive_seed(seed, "model"), dtype=dtype, vocab_size=_num_token_ids(tokenizer), **special
    )


def load_tokenizer(settings: ModelSettings) -> Any:
    """Load the tokenizer of a model on disk.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    source = source_of(settings)
    with _quiet_bars(is_local=isinstance(source, Path)):
        return _load_tokenizer(source, settings)


def _load_tokenizer(source: Path | str, settings: ModelSettings) -> Any:
    where = _where(source, settings)
    tokenizer = _attempt(settings, "its tokenizer", lambda: AutoTokenizer.from_pretrained(**where))
    # A folder without tokenizer files gives a tokenizer that knows its special tokens and no word.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise _error(settings.name, "it has no tokenizer: save the tokenizer beside the weights")
    return tokenizer


def _num_token_ids(tokenizer: Any) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def _refuse_bad_tensors(model: nn.Module, name: str) -> None:
    tensors = model.state_dict()
    for tensor_name, parameter in model.named_parameters():
        if parameter.dtype not in _WEIGHT_DTYPES:
            reason = f"tensor {tensor_name} is {parameter.dtype}; quantised checkpoints are not supported"
            raise _error(name, reason)
    bad = first_non_finite(tensors)
    if bad is not None:
        raise _error(name, f"tensor {bad} of the checkpoint has a NaN or an infinity")


def _refuse_foreign_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    num_rows, num_ids = model.get_input_embeddings().weight.shape[0], _num_token_ids(tokenizer)
    if num_ids > num_rows:
        raise _error(name, f"the tokenizer has {num_ids} token ids, but the model knows only {num_rows}")
