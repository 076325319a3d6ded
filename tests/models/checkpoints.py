"""What damaged checkpoints are made with."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Damage = Callable[[str, Callable[[dict[str, Tensor]], object]], Path]


def word_tokenizer(num_words: int = 100) -> PreTrainedTokenizerFast:
    """Four special tokens and ``num_words`` words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(num_words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
