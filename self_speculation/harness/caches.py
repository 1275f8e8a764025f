"""Answers and prompts that lm-eval keeps for later runs: one file for each way of making them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lm_eval.caching.cache as request_cache

from self_speculation.harness.arguments import EvalArguments


def keep_caches_apart(arguments: EvalArguments, description: dict[str, Any], output_dir: Path) -> None:
    """Name caches after the settings: lm-eval's own names tell neither models nor exit layers nor folders apart."""
    settings = json.dumps([description, arguments.gen_kwargs, arguments.data_dir], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    request_cache.PATH = str(output_dir / "requests" / digest)
    if arguments.use_cache is not None:
        arguments.use_cache = f"{arguments.use_cache}_{digest}"
