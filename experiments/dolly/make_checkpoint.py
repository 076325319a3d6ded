"""A small checkpoint of another family than the embedded one, for the Dolly experiment.

Trains an OLMoE of 2.4 million parameters on plain text (novels, encyclopaedia, stories; no Dolly) with
a byte-level BPE of 4,096 entries, and saves both by ``save_pretrained``. The tokenizer has no chat template.
Tokenizer and text are read from the folder that the environment variable FEDEXPERTS_DATA names:
``tokenizers/bpe_4096_tokenizer.json`` and ``text/*.txt.gz``.

    FEDEXPERTS_DATA=DIR python experiments/dolly/make_checkpoint.py --to dolly-olmoe
"""

import gzip
import math
import os
import re
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from fedexperts.data.prompts import Encoded
from fedexperts.errors import UserError
from fedexperts.evaluation.loss import mean_loss
from fedexperts.pretrain import PretrainSettings
from fedexperts.pretrain.rows import Row, pack
from fedexperts.pretrain.training import train
from fedexperts.seeds import derive_random, derive_seed

DATA = "FEDEXPERTS_DATA"
NUM_HELD_OUT = 200
"""Passages that are not trained on."""


def read_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """The BPE of 4,096 entries with its special tokens named, and no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizers" / "bpe_4096_tokenizer.json"),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def read_passages(data: Path, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[list[int]]:
    """Token ids of all paragraphs, each with EOS; what is over ``longest`` tokens becomes another passage."""
    files = sorted((data / "text").glob("*.txt.gz"))
    if not files:
        raise UserError(f"{data / 'text'} holds no *.txt.gz")
    paragraphs = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as text:
            paragraphs += [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.read())]
    encoded = tokenizer([part for part in paragraphs if part], add_special_tokens=False, verbose=False)
    passages = []
    for ids in encoded["input_ids"]:
        whole = [*ids, tokenizer.eos_token_id]
        passages += [whole[start : start + longest] for start in range(0, len(whole), longest)]
    return [passage for passage in passages if len(passage) > 1]


def rows_of(
    passages: list[list[int]], tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings
) -> Iterator[list[Row]]:
    """Batches of packed rows without end, all passages in each pass; every token but the first is learnt."""
    rng = derive_random(settings.seed, "dolly checkpoint", "rows")
    rows = pack(
        [(ids, [*ids[1:], -100]) for ids in passages], settings.row_tokens, int(tokenizer.pad_token_id)
    )
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows) - settings.rows_per_step + 1, settings.rows_per_step):
            yield rows[start : start + settings.rows_per_step]


def new_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """An untrained OLMoE, its weights drawn from the seed alone."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_token,
        norm_topk_prob=False,
        router_aux_loss_coef=settings.router_aux_loss,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "dolly checkpoint", "weights"))
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def held_out_loss(model: OlmoeForCausalLM, passages: list[list[int]], pad_token_id: int) -> float:
    """Nats per token, the first of each passage left out."""
    encoded = [Encoded(input_ids=tuple(ids), prompt_length=1, is_truncated=False) for ids in passages]
    return mean_loss(model, encoded, batch_size=16, pad_token_id=pad_token_id)


def make_checkpoint(data: Path, to: Path, settings: PretrainSettings) -> None:
    """Train and save, and print the loss on held-out passages before and after."""
    torch.set_num_threads(settings.threads)
    tokenizer = read_tokenizer(data)
    passages = read_passages(data, tokenizer, settings.row_tokens)
    derive_random(settings.seed, "dolly checkpoint", "passages").shuffle(passages)
    held_out, trained_on = passages[:NUM_HELD_OUT], passages[NUM_HELD_OUT:]
    model = new_model(settings, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(trained_on):,} passages")
    before = held_out_loss(model, held_out, int(tokenizer.pad_token_id))
    started = time.monotonic()
    _, _, num_tokens = train(model, rows_of(trained_on, tokenizer, settings), settings, print)
    seconds = time.monotonic() - started
    after = held_out_loss(model, held_out, int(tokenizer.pad_token_id))
    print(
        f"{num_tokens:,} tokens in {seconds:.0f} s; held-out loss {before:.3f} -> {after:.3f} nats per token "
        f"(perplexity {math.exp(before):,.0f} -> {math.exp(after):,.0f})"
    )
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def main() -> None:
    """Read the command line."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    given = parser.parse_args()
    if DATA not in os.environ:
        parser.error(f"the environment variable {DATA} is not set: it names the folder with the data")
    if given.to.exists():
        parser.error(f"--to {given.to} exists already")
    settings = PretrainSettings(
        threads=given.threads,
        num_steps=given.steps,
        warmup_steps=min(50, given.steps),
        rows_per_step=16,
        learning_rate=3e-3,
        row_tokens=192,
        hidden_size=128,
        num_layers=4,
        num_experts=16,
        num_experts_per_token=4,
        expert_size=64,
    )
    make_checkpoint(Path(os.environ[DATA]), given.to, settings)


if __name__ == "__main__":
    main()
