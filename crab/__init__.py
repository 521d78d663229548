"""Crab+ on a laptop: one audio-visual model for many tasks. Each room below has a docstring that says what it holds."""
