"""The 4-bit base and its LoRA."""
