"""Hugging Face folders in and out: checkpoints, configurations, tokenizers."""
