"""Audio-visual language models: a base, its processor, and how the base is trained."""
