"""Decoding: the rows of a batch, the model cut at a layer, one step, its session and its compilation."""
