"""Fixtures that several tests share: a tiny checkpoint on disk, a configuration over it, a quiet progress."""

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedexperts.config.load import build_config
from fedexperts.config.schema import RunConfig
from fedexperts.data.tinyworld import CATEGORIES, make_example
from fedexperts.models.tiny import tiny_model
from fedexperts.running.progress import QuietProgress

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 entries over a few generated examples, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    examples = [
        make_example(seed=0, category=name, index=index) for name in CATEGORIES for index in range(20)
    ]
    tokenizer.train_from_iterator([f"{e.instruction} {e.response}" for e in examples], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Set one thread before any fixture of any scope computes; the bits of a sum depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _package_log_as_imported() -> Iterator[None]:
    """Undo what a command that runs in this process sets up for its log."""
    yield
    package = logging.getLogger("fedexperts")
    package.handlers, package.propagate = [], True
    package.setLevel(
        logging.NOTSET
    )  # clears what its children remember of the level; setting `level` does not


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE of 2 layers and 6 experts with its tokenizer, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    tokenizer = make_tokenizer()
    model = tiny_model(
        "qwen2_moe",
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_finish() -> None:
    """Keep what imports and collection made out of the collector's passes, a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


ConfigMaker = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def make_config(tiny_checkpoint: Path) -> ConfigMaker:
    """A small run's configuration: three tinyworld clients, two rounds; overrides as on the command line."""

    def make(algorithm: str = "flex", *overrides: str, **sections: Any) -> RunConfig:
        table: dict[str, Any] = {
            "seed": 3,
            "rounds": 2,
            "threads": 1,
            "model": {"name": str(tiny_checkpoint)},
            "adapter": {"rank": 2},
            "data": {
                "source": "tinyworld",
                "max_tokens": 192,
                "partition": {"num_clients": 3},
                "tinyworld": {"examples_per_client": 24},
            },
            "training": {"num_local_steps": 2, "batch_size": 4},
            "algorithm": {"name": algorithm},
            "evaluation": {
                "max_new_tokens": 2,
                "max_test_examples": 2,
                "matrix": False,
                "exam": {"num_questions": 3},
                "retention": {"num_free_questions": 0, "num_neutral": 0},
            },
        }
        return build_config(table | sections, "test.toml", overrides)

    return make


@pytest.fixture
def quiet() -> QuietProgress:
    """Progress that shows nothing."""
    return QuietProgress()
