"""Say which tokens of a batch's rows are their prompts, and give each row a number made of its prompt.

The number holds for prompt and answer: it is made once for each prompt, before the pass that has it first.

Shape suffixes: ``B`` rows or prompts, ``T`` tokens, ``D`` hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedexperts.errors import UserError
from fedexperts.moe.observing.forward_pass import evaluation_mode

Prompt = tuple[int, ...]
_announced: list[Callable[[], Sequence[Prompt]]] = []


@contextmanager
def prompts_are(prompts: Callable[[], Sequence[Prompt]]) -> Iterator[None]:
    """Say within the block which tokens of each row of a batch are its prompt; only asked for if needed.

    Without it a row's prompt is all that a forward pass gets of it, padding left out.
    """
    _announced.append(prompts)
    try:
        yield
    finally:
        _announced.pop()


class PerPrompt(nn.Module, ABC):
    """A number for each row of the forward pass that runs; none in training, nor before the first pass."""

    def __init__(self) -> None:
        """Know no prompt."""
        super().__init__()
        self._known: dict[Prompt, Tensor] = {}
        self._known_for: list[Tensor] = []
        self._rows_B: Tensor | None = None
        self._scaling: dict[int, dict[str, float]] = {}

    @abstractmethod
    def numbers_of(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return the number of each prompt, shape (B,), by parameters of this module."""

    @abstractmethod
    def factors(self, rows: Tensor, scaling: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the factors of a module's adapters by name, from each row's number and the fixed factors."""

    def attach(self, model: Any, name: str, *, weighs_lora: bool) -> Callable[[], None]:
        """Become a part of ``model`` that every forward pass asks; return what takes it out again."""
        model.add_module(name, self.train(model.training))
        handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for module in model.modules() if weighs_lora else ():
            if isinstance(module, LoraLayer):
                handles.append(module.register_forward_pre_hook(self._weigh))
                handles.append(module.register_forward_hook(self._restore, always_call=True))

        def detach() -> None:
            for handle in handles:
                handle.remove()
            delattr(model, name)

        return detach

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the rows of the forward pass that begins their numbers."""
        if model.training:
            return
        cache = kwargs.get("past_key_values")
        if not _announced and cache is not None and cache.get_seq_length() and self._rows_B is not None:
            return  # a step of transformers' own generation, whose first pass had the prompts
        prompts = _announced[-1]() if _announced else _rows_of(args, kwargs)
        self._rows_B = self._numbers(model, prompts)

    def _numbers(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return the prompts' numbers; those of prompts seen before are not made again."""
        present = list(self.parameters())
        if len(present) != len(self._known_for) or not all(map(torch.equal, present, self._known_for)):
            self._known, self._known_for = {}, [one.detach().clone() for one in present]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known |= zip(new, self.numbers_of(model, new), strict=True)
        return torch.stack([self._known[prompt] for prompt in prompts])

    def for_rows(self, hidden: Tensor) -> Tensor | None:
        """Return numbers that multiply ``hidden``, (B, T, D) or (B T, D); None where there are none."""
        if self.training or self._rows_B is None:
            return None
        rows_each, rest = divmod(hidden.shape[0], len(self._rows_B))
        if rest or (hidden.dim() > 2 and rows_each != 1):
            raise RuntimeError(
                f"{tuple(hidden.shape)} is not of {len(self._rows_B)} instances with weights of their own"
            )
        return self._rows_B.repeat_interleave(rows_each).reshape(-1, *(1 for _ in hidden.shape[1:]))

    def _weigh(self, layer: LoraLayer, args: tuple[Tensor, ...]) -> None:
        """Give the adapters of one module each row's factors in place of the fixed ones."""
        rows = self.for_rows(args[0])
        if rows is not None:
            self._scaling[id(layer)] = dict(layer.scaling)
            layer.scaling.update(self.factors(rows, layer.scaling))

    def _restore(self, layer: LoraLayer, *_: Any) -> None:
        """Give one module its fixed factors back."""
        layer.scaling.update(self._scaling.pop(id(layer), {}))

    @contextmanager
    def all_rows(self, number: float, num_rows: int) -> Iterator[None]:
        """Give every one of ``num_rows`` rows the same number inside the block."""
        before, self._rows_B = self._rows_B, torch.full((num_rows,), number, device=self._device())
        try:
            yield
        finally:
            self._rows_B = before

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def last_hidden(self, model: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return the last layer's output (B, T, D) with right padding, and the prompts' lengths (B,)."""
        device = self._device()
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(input_ids.shape[1], device=device) < lengths_B.unsqueeze(1)).long()
        with evaluation_mode(model):
            output = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state, lengths_B


def _rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Prompt]:
    """Return the tokens of each row, padding left out."""
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is None:
        raise UserError("a model that looks at each prompt needs input_ids")
    mask = kwargs.get("attention_mask")
    is_token = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
    return [tuple(row[kept.bool()].tolist()) for row, kept in zip(input_ids, is_token, strict=True)]


def hidden_size(model: Any) -> int:
    """Return the size of one hidden state."""
    return int(model.config.get_text_config().hidden_size)
