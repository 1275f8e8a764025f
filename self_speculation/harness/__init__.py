"""lm-evaluation-harness over our decoding: the model behind its interface, tasks, reports."""
