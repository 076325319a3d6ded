"""Pretrain the shipped model: corpus, tokenizer, training, scores, and a folder to load."""

from fedexperts.pretrain.run import PretrainReport, pretrain
from fedexperts.pretrain.settings import PretrainSettings

__all__ = ["PretrainReport", "PretrainSettings", "pretrain"]
