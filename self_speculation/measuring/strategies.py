"""Every strategy that can be measured, by its name: ours, and transformers' own that ours are measured against."""

from self_speculation import loading
from self_speculation.measuring.rivals import (
    HuggingfaceEarlyExitStrategy,
    HuggingfaceStaticStrategy,
    HuggingfaceStrategy,
)

RIVALS: loading.Strategies = {
    "hf_generate": HuggingfaceStrategy,
    "hf_early_exit": HuggingfaceEarlyExitStrategy,
    "hf_static": HuggingfaceStaticStrategy,
}
STRATEGIES: loading.Strategies = {**loading.STRATEGIES, **RIVALS}
