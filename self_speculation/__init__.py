"""LayerSkip: early-exit training and lossless self-speculative decoding (arXiv 2404.16710)."""
