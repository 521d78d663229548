"""The study: encode, train, predict, score, compare and picture; what the notebooks call."""
