"""Checkpoints on disk: one that is sound, and copies of it with one thing wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Damage, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedexperts.models.tiny import tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-MoE with a tokenizer, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sound"
    tiny_model("qwen2_moe").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Damage:
    """A copy of the sound checkpoint whose tensors went through a function."""

    def make(name: str, edit: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
