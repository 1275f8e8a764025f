"""What may be chosen of layer dropout and the early-exit loss (section 4.1 of the paper); known without torch."""

from typing import Literal

# S(t) and D(l) of layer dropout (4.1.1).
TimeSchedule = Literal["exponential", "constant", "decreasing"]
DepthSchedule = Literal["exponential", "linear", "constant"]
# C(t, l), e(l), and what the early exits learn (4.1.2).
Curriculum = Literal["rotational", "gradual", "none"]
ExitWeights = Literal["paper", "uniform"]
ExitTarget = Literal["labels", "last_layer", "acceptance"]

# Positions whose logits are held at a time.
CHUNK_TOKENS = 512
