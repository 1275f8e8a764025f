# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""LayerSkip: early-exit training and lossless self-speculative decoding (arXiv 2404.16710)."""
