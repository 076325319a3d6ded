"""FedAvg on LoRA as it is usually written: a new TRL trainer for every client and round.

The loop is that of OpenFedLLM's ``main_sft.py`` (Ye et al., KDD 2024, arXiv 2402.06954): load the global
adapter into the one model, draw this round's examples, make a trainer, train, copy the adapter out, average
by number of examples. It is set up so as not to lose by neglect: the model is loaded once, nothing is saved,
logged or reported, float32, no gradient checkpointing, no worker processes, the fused optimizer.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedexperts.config.schema import RunConfig
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import encode_all
from fedexperts.data.examples import Example
from fedexperts.data.federated import FederatedData, load_federated_data
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.models.adapters import find_targets, lora_config, lora_state, peft_state
from fedexperts.seeds import derive_random
from fedexperts.tensors import Tensors
from fedexperts.training.settings import learning_rate_share

Records = dict[str, list[dict[str, Any]]]
"""Training examples by client."""


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """What came of one job, ours or theirs."""

    loading_seconds: float
    """Reading data and model."""
    rounds_seconds: float
    """All rounds, on the clock."""
    phases: dict[str, float]
    """Seconds of the rounds by phase."""
    losses: list[float]
    """Mean training loss of each round."""
    state: Tensors
    """The global LoRA after the last round, by our names."""


class UsualRecipe:
    """One job, from the same configuration as ours."""

    def __init__(self, source: str, config: RunConfig, start: Tensors, *, tokenized_before: bool) -> None:
        """Start from LoRA ``start``.

        ``tokenized_before`` is a kinder recipe: every example is tokenized once, before the first round.
        """
        self._source, self._config, self._start = source, config, start
        self._tokenized_before = tokenized_before
        datasets.disable_progress_bars()

    def run(self, tokenizer: Any) -> JobRun:
        """All rounds over all clients."""
        started = time.perf_counter()
        model = self.model()
        format = PromptFormat(tokenizer, self._config.data.template, self._config.data.max_tokens)
        with load_federated_data(self._config.data, self._config.seed) as data:
            records = {client_id: self.records(data, client_id, format) for client_id in data.client_ids}
        loaded = time.perf_counter()
        watch, losses, state = Stopwatch(), [], peft_state(self._start)
        for round in range(1, self._config.rounds + 1):
            state, loss = self._round(round, model, state, records, tokenizer, watch)
            losses.append(loss)
        return JobRun(
            loading_seconds=loaded - started,
            rounds_seconds=time.perf_counter() - loaded,
            phases=watch.seconds,
            losses=losses,
            state=lora_state(state),
        )

    def model(self) -> PeftModel:
        """The checkpoint with LoRA, once for all clients."""
        base = AutoModelForCausalLM.from_pretrained(self._source, dtype=torch.float32)
        adapter = self._config.adapter
        return get_peft_model(base, lora_config(adapter, find_targets(base, adapter.target_modules)))

    def records(self, data: FederatedData, client_id: str, format: PromptFormat) -> list[dict[str, Any]]:
        """A client's training examples as TRL takes them."""
        examples = data.examples(client_id, "train")
        encoded, _ = encode_all(format, examples)
        assert len(encoded) == len(examples), "an example without a label is drawn by nobody"
        if self._tokenized_before:
            return [_tokenized(each) for each in encoded]
        return [_worded(format, example) for example in examples]

    def _round(
        self, round: int, model: PeftModel, state: Tensors, records: Records, tokenizer: Any, watch: Stopwatch
    ) -> tuple[Tensors, float]:
        """One round: the averaged adapter by PEFT's names, and the mean training loss."""
        states, losses = [], []
        for client_id, all_records in records.items():
            with watch.phase("adapter in"):
                set_peft_model_state_dict(model, state)
            with watch.phase("data set and trainer"):
                drawn = self._draw(all_records, client_id, round)
                trainer = self.trainer(model, drawn, tokenizer, round)
            with watch.phase("training"):
                losses.append(trainer.train().training_loss)
            with watch.phase("adapter out"):
                states.append(copy.deepcopy(get_peft_model_state_dict(model)))
        with watch.phase("averaging"):
            averaged = _average(states, [len(all_records) for all_records in records.values()])
        return averaged, sum(losses) / len(losses)

    def _draw(self, records: list[dict[str, Any]], client_id: str, round: int) -> list[dict[str, Any]]:
        """The same examples as our client draws in this round."""
        training = self._config.training
        wanted = training.num_local_steps * training.batch_size
        assert wanted <= len(records), "examples would be drawn twice"
        return derive_random(self._config.seed, "batches", client_id, round).sample(records, wanted)

    def trainer(
        self, model: PeftModel, records: list[dict[str, Any]], tokenizer: Any, round: int
    ) -> SFTTrainer:
        """A new trainer over a new data set in memory."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=model,
                args=self._arguments(folder, round),
                train_dataset=datasets.Dataset.from_list(records),
                processing_class=tokenizer,
            )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, folder: str, round: int) -> SFTConfig:
        config, training = self._config, self._config.training
        return SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            router_aux_loss_coef=0.0,
            max_length=config.data.max_tokens,
            completion_only_loss=True,
            dataset_kwargs={"skip_prepare_dataset": self._tokenized_before},
            max_steps=training.num_local_steps,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.lr * learning_rate_share(round, config.rounds, training),
            lr_scheduler_type="constant",
            weight_decay=training.weight_decay,
            max_grad_norm=training.gradient_clip,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )


def _worded(format: PromptFormat, example: Example) -> dict[str, Any]:
    return {
        "prompt": format.prompt_text(example),
        "completion": example.response + format.tokenizer.eos_token,
    }


def _tokenized(encoded: Encoded) -> dict[str, Any]:
    ids, length = list(encoded.input_ids), encoded.prompt_length
    return {"input_ids": ids, "labels": [-100] * length + ids[length:]}


def _average(states: Sequence[dict[str, Tensor]], weights: Sequence[int]) -> Tensors:
    total = sum(weights)
    return {
        name: sum(state[name] * (weight / total) for state, weight in zip(states, weights, strict=True))
        for name in states[0]
    }
