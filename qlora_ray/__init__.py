"""Distributed QLoRA fine-tuning: Ray Train, a 4-bit LoRA model, DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
