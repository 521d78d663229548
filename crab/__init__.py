"""Crab+: one audio-visual model for many scene-understanding tasks, with I-LoRA adapters."""
