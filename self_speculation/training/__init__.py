"""Training (section 4.1 of the paper): layer dropout, early-exit loss, the trainer, and what it is fed."""
