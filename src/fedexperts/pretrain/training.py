"""Build the model and train it.

``B`` rows, ``T`` tokens of a row, ``N`` = B T, ``E`` experts, ``K`` experts per token.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedexperts.errors import UserError
from fedexperts.pretrain.rows import Row
from fedexperts.pretrain.settings import PretrainSettings
from fedexperts.seeds import derive_seed

Report = Callable[[str], None]


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Build an untrained model of ``settings``; its weights are drawn from the seed alone."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.shared_expert_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        decoder_sparse_step=1,
        moe_intermediate_size=settings.expert_size,
        shared_expert_intermediate_size=settings.shared_expert_size,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_token,
        norm_topk_prob=False,
        router_aux_loss_coef=settings.router_aux_loss,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "pretrain", "weights"))
        model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def train(
    model: PreTrainedModel, batches: Iterator[list[Row]], settings: PretrainSettings, report: Report
) -> tuple[float, int, int]:
    """Train a model of any family that returns its router logits, on as many ``batches`` as there are steps.

    Returns the loss of the last 100 steps, and how many texts and tokens were trained on.
    """
    optimizer = _optimizer(model, settings)
    losses: list[float] = []
    num_texts = num_tokens = 0
    started = time.monotonic()
    model.train()
    for step, rows in enumerate(islice(batches, settings.num_steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        loss = _step(model, optimizer, rows, settings)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step} is {loss}; lower learning_rate {settings.learning_rate}"
            )
        losses.append(loss)
        num_texts += sum(max(row.segments) + 1 for row in rows)
        num_tokens += sum(len(row.ids) - row.segments.count(-1) for row in rows)
        if step % 50 == 0 or step == settings.num_steps:
            speed = num_tokens / (time.monotonic() - started)
            recent = sum(losses[-50:]) / len(losses[-50:])
            report(f"step {step}/{settings.num_steps}  loss {recent:.4f}  {speed:,.0f} tokens/s")
    return sum(losses[-100:]) / len(losses[-100:]), num_texts, num_tokens


def _optimizer(model: PreTrainedModel, settings: PretrainSettings) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def _schedule(step: int, settings: PretrainSettings) -> float:
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    rows: list[Row],
    settings: PretrainSettings,
) -> float:
    ids_BT = torch.tensor([row.ids for row in rows])
    labels_BT = torch.tensor([row.labels for row in rows])
    segments_BT = torch.tensor([row.segments for row in rows])
    outputs = model.model(
        input_ids=ids_BT,
        position_ids=torch.tensor([row.positions for row in rows]),
        attention_mask=segment_mask(segments_BT),
        output_router_logits=True,
        use_cache=False,
    )
    learnt = (labels_BT.flatten() != -100).nonzero().flatten()
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, learnt)
    loss = functional.cross_entropy(model.lm_head(hidden), labels_BT.flatten()[learnt])
    texts = (segments_BT.flatten() >= 0).nonzero().flatten()
    balance = _balance_loss(outputs.router_logits, texts, settings.num_experts_per_token)
    total: Any = loss + settings.router_aux_loss * balance
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def segment_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Return an additive mask (B, 1, T, T): a token attends to itself and earlier tokens of its own text."""
    is_visible = (segments_BT[:, :, None] == segments_BT[:, None, :]).tril()
    mask = torch.zeros(is_visible.shape).masked_fill(~is_visible, torch.finfo(torch.float32).min)
    return mask[:, None]


def _balance_loss(router_logits: tuple[torch.Tensor, ...], texts: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the mean over layers of E times token share by mean probability, summed (Switch, eq. 4).

    Computed layer by layer; transformers' own loss pools the layers, so that one layer may stay unbalanced.
    """
    losses = []
    for logits_NE in router_logits:
        probabilities_NE = logits_NE.index_select(0, texts).float().softmax(-1)
        chosen_NK = probabilities_NE.topk(top_k, dim=-1).indices
        num_experts = probabilities_NE.shape[-1]
        share_E = torch.bincount(chosen_NK.flatten(), minlength=num_experts) / chosen_NK.numel()
        losses.append(num_experts * (share_E * probabilities_NE.mean(0)).sum())
    return torch.stack(losses).mean()
