"""Training (section 4.1 of the paper): layer dropout, early-exit loss, the trainer, and what it is fed.

To begin with, read `layer_dropout` (4.1.1), `early_exit_loss` (4.1.2) with `chunked_loss` below it, and `trainer`,
which joins them. `lora` and `anchor` are for models that were trained before. `labels`, `tokenizer`, `packing` and
`responses` make what it is fed, `models` and `arguments` what it is given by flags.
"""
