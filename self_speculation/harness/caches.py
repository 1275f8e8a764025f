"""Answers and prompts that lm-eval keeps for later runs: one file for each way of making them.

lm-eval keeps them pickled, and to read a pickle is to run it. So where no folder is named they lie in one that nobody
else can write to, a file that others can write to is refused, and a line says which files are read.
"""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import lm_eval.caching.cache as request_cache

from self_speculation.harness.arguments import EvalArguments
from self_speculation.harness.trusted_files import check_ours, private_folder, warn


def keep_caches_apart(arguments: EvalArguments, description: dict[str, Any], output_dir: Path) -> None:
    """Name caches after the settings: lm-eval's own names tell neither models nor exit layers nor folders apart.

    Raises:
        ValueError: others can write to them.
    """
    settings = json.dumps([description, arguments.gen_kwargs, arguments.data_dir], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    requests = output_dir / "requests" / digest
    request_cache.PATH = str(requests)
    if arguments.cache_requests or arguments.rewrite_requests_cache:
        private_folder("cache_requests", requests)
        warn(f"--cache_requests: the files in {requests} are unpickled, which runs what is in them.")
    if arguments.use_cache is not None:
        named = Path(arguments.use_cache)
        folder = private_folder("use_cache", output_dir / "answers") if named.parent == Path() else named.parent
        arguments.use_cache = str(folder / f"{named.name}_{digest}")
        for file in folder.glob(f"{glob.escape(named.name)}_{digest}_*.db"):
            check_ours("use_cache", file)
        warn(f"--use_cache: {arguments.use_cache}_….db is unpickled, which runs what is in it.")
