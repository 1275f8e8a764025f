"""Would other ways to draft pay? Counted on the full model's own greedy answers before any is built.

python benchmarks/draft_rules.py --exit_layer 7 --heads 500 2000 --dataset top_v2 --num_samples 60 --max_steps 80

Two questions, which every exit's choices at every token of the answers decide:

- *Heads.* How much of an answer does the exit know with the whole LM head, with the N most frequent tokens, and with
  those and the tokens of the prompt? Speeds are bounds: passes take as long as their weights are read. A whole head in
  8 bits is taken to choose as the one in 16 does, and to be read in half the time.
- *Drafts that cost nothing*, which followed the same tokens before: is it better to take them as they are, or to let
  the exit check them in one pass, and go on from where they part (a cascade)? By the length of the match, at every
  token where there is one.

The last line is one JSON object; that is written to OUTPUT_DIR/draft_rules.json, too.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.caterpillar import CaterpillarConfig, encoded_prompts, read_by_head
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.draft_head import token_order
from self_speculation.decoding.early_exit import check_exit_layer, head_logits
from self_speculation.decoding.lookup import Lookup
from self_speculation.decoding.policy import PRIOR_OF_FREE
from self_speculation.ending import one_sentence_errors
from self_speculation.exit_adapter import exit_adapter
from self_speculation.generator_base import HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, advice_for, load
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.settings import Settings, by_flag, setting

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)
MOST_FREE = 8


@dataclass
class RulesArguments(Settings):
    """Which heads."""

    heads: list[int] = setting(default_factory=lambda: [500, 2000], help="N, for heads of the N most frequent tokens.")


@dataclass(frozen=True)
class Answer:
    """A prompt, the full model's answer, and by the head's name where the exit would have drafted its tokens."""

    prompt: list[int]
    tokens: list[int]
    is_right: dict[str, list[bool]]


@dataclass(frozen=True)
class Weights:
    """Bytes that passes read: all layers, those that draft, and the LM head."""

    layers: int
    drafting: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel, exit_layer: int) -> "Weights":
        """Of a model that is cut at an exit, with the adapter that it may have there."""
        sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers]
        adapter = exit_adapter(model, exit_layer)
        own = 0 if adapter is None else sum(weight.nbytes for weight in adapter.parameters())
        return cls(sum(sizes), sum(sizes[:exit_layer]) + own, model.lm_head.weight.nbytes)

    def seconds(self, drafts: int, head: float) -> float:
        """A step over one of autoregressive decoding; `head` is the share of the LM head that drafts."""
        whole = self.layers + self.head
        return (whole + drafts * (self.drafting + head * self.head)) / whole


# What the exit knows


def answers(
    generator: HuggingfaceLlamaGenerator,
    prompts: list[list[int]],
    config: CaterpillarConfig,
    exit_layer: int,
    heads: Mapping[str, Tensor | None],
) -> Iterator[Answer]:
    """The full model's answers, as the exit reads them with each head's tokens."""
    for first in tqdm(range(0, len(prompts), config.batch_size), desc="Answering", unit="batch"):
        batch = prompts[first : first + config.batch_size]
        for prompt, result in zip(batch, generator.generate(batch, config.generation()), strict=True):
            if result.tokens:
                logits_NV = exit_logits(generator.model, prompt, result.tokens, exit_layer)
                yield Answer(prompt, result.tokens, known(logits_NV, prompt, result.tokens, heads))


@torch.inference_mode()
def exit_logits(model: PreTrainedModel, prompt: list[int], answer: list[int], exit_layer: int) -> Tensor:
    """The exit's logits (N, V) for each token of an answer, behind its adapter, if there is one."""
    tokens_1T = torch.tensor([prompt + answer], device=model.device)
    normed_1TD = read_by_head(model, tokens_1T, exit_layer)
    return head_logits(model, normed_1TD[:, len(prompt) - 1 : -1])[0]


def known(
    logits_NV: Tensor, prompt: list[int], answer: list[int], heads: Mapping[str, Tensor | None]
) -> dict[str, list[bool]]:
    """Which tokens of the answer the exit would draft, by head; `heads` have their tokens, None for all of them."""
    target_N = torch.tensor(answer, device=logits_NV.device)
    found = {}
    for name, tokens in heads.items():
        chosen = {name: tokens}
        if tokens is not None:
            chosen[f"{name} and the prompt's"] = torch.cat([tokens, torch.tensor(prompt)])
        for own, allowed in chosen.items():
            found[own] = (_among(logits_NV, allowed).argmax(-1) == target_N).tolist()
    return found


def _among(logits_NV: Tensor, tokens: Tensor | None) -> Tensor:
    if tokens is None:
        return logits_NV
    impossible_NV = torch.full_like(logits_NV, float("-inf"))
    return impossible_NV.index_copy(1, tokens.unique(), logits_NV[:, tokens.unique()])


# What it is worth


def steps(is_right: Sequence[bool], drafts: int) -> int:
    """How many steps of d drafts an answer takes."""
    count, first = 0, 0
    while first < len(is_right):
        first += run(is_right, first, drafts) + 1
        count += 1
    return count


def run(is_right: Sequence[bool], first: int, most: int) -> int:
    """How many tokens from there on are right, one after the other."""
    return len(list(takewhile(bool, is_right[first : first + most])))


def head_rows(found: list[Answer], weights: Weights, shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each head at its best draft length."""
    rows = []
    for name, share in shares.items():
        own = [answer.is_right["all tokens" if name == IN_8_BITS else name] for answer in found]
        tokens = sum(map(len, own))
        speeds = {
            drafts: tokens / sum(steps(one, drafts) for one in own) / weights.seconds(drafts, share)
            for drafts in DRAFT_LENGTHS
        }
        best = max(speeds, key=lambda drafts: speeds[drafts])
        agreement = sum(map(sum, own)) / tokens
        rows.append({"head": name, "agreement": agreement, "num_speculations": best, "speed": speeds[best]})
    return rows


ALL_TOKENS, IN_8_BITS = "all tokens", "all tokens, in 8 bits"


def free_rows(found: list[Answer], weights: Weights, head: str, share: float) -> list[dict[str, Any]]:
    """By the match: tokens over seconds of free drafts as they are, of a cascade, and of the exit's own drafts."""
    tokens: dict[tuple[float, str, int], int] = defaultdict(int)
    seconds: dict[tuple[float, str, int], float] = defaultdict(float)
    places: dict[float, int] = defaultdict(int)
    for answer in found:
        for match, first, free in free_drafts(answer):
            places[match] += 1
            right = run(answer.is_right[head], first, MOST_FREE)
            agreed = run([a and b for a, b in zip(free, answer.is_right[head][first:], strict=False)], 0, MOST_FREE)
            for drafts in DRAFT_LENGTHS:
                ways = {
                    "free": (run(free, 0, drafts), 0),
                    "cascade": (min(right, drafts), 1 + max(drafts - agreed - 1, 0)),
                    "exit": (min(right, drafts), drafts),
                }
                for way, (accepted, passes) in ways.items():
                    tokens[match, way, drafts] += accepted + 1
                    seconds[match, way, drafts] += weights.seconds(passes, share)
    speeds = {key: tokens[key] / seconds[key] for key in tokens}
    return [
        {"match": match, "places": places[match]}
        | {way: max(speeds[match, way, drafts] for drafts in DRAFT_LENGTHS) for way in ("free", "cascade", "exit")}
        for match in sorted(places)
    ]


def free_drafts(answer: Answer) -> Iterator[tuple[float, int, list[bool]]]:
    """Where a draft costs nothing: the least match of its kind, the place, and which of its tokens are right."""
    lookup = Lookup()
    lookup.extend(answer.prompt)
    for first, token in enumerate(answer.tokens):
        draft = lookup.draft(MOST_FREE)
        if draft.tokens:
            pairs = zip(draft.tokens, answer.tokens[first:], strict=False)
            yield max(least for least in PRIOR_OF_FREE if least <= draft.match), first, [a == b for a, b in pairs]
        lookup.extend([token])


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, dataset, config, output = groups = parse(
        RulesArguments, ModelArguments, DatasetArguments, CaterpillarConfig, OutputArguments, description=__doc__
    )
    settings = by_flag(*groups)
    model, tokenizer = load(model_arguments)
    exits = config.exit_layers or [advice_for(model, dataset.dataset).exit_layer]
    if len(exits) > 1:
        raise ValueError("--exit_layer must be one here.")
    exit_layer, vocabulary = check_exit_layer(exits[0], model), model.config.vocab_size
    if not all(0 < size <= vocabulary for size in arguments.heads):
        raise ValueError(f"--heads must lie between 1 and {vocabulary}, the model's vocabulary.")
    order = token_order(model.name_or_path or "", vocabulary)
    heads = {ALL_TOKENS: None} | {f"{size:,}": order[:size] for size in sorted(arguments.heads)}
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    log = RunLog(Path(output.output_dir), "draft_rules")
    log.begin(settings, resume=False)
    config = dataclasses.replace(config, draft_vocab=None)
    found = list(answers(generator, encoded_prompts(generator, dataset, config), config, exit_layer, heads))
    shares = {ALL_TOKENS: 1.0, IN_8_BITS: 0.5} | {
        name: len(tokens) / vocabulary
        for own, tokens in heads.items()
        if tokens is not None
        for name in (own, f"{own} and the prompt's")
    }
    weights = Weights.of(model, exit_layer)
    rows = head_rows(found, weights, shares)
    best = max((row for row in rows if row["head"] != IN_8_BITS), key=lambda row: row["speed"])["head"]
    matches = free_rows(found, weights, best, shares[best])
    show(rows, matches)
    document = {"arguments": settings, "surroundings": surroundings(model.device)} | {"heads": rows, "free": matches}
    log.write(document)
    print(json.dumps(document))


def show(rows: list[dict[str, Any]], matches: list[dict[str, Any]]) -> None:
    """Both tables; speeds are over autoregressive decoding's."""
    console = Console(highlight=False)
    texts = [
        (row["head"], f"{row['agreement']:.1%}", str(row["num_speculations"]), f"{row['speed']:.2f}") for row in rows
    ]
    console.print(plain_table(("head", "agreement", "best d", "over AR"), texts, num_names=1))
    texts = [
        (
            f"{row['match']:.0f} and more",
            str(row["places"]),
            *(f"{row[way]:.2f}" for way in ("free", "cascade", "exit")),
        )
        for row in matches
    ]
    console.print(plain_table(("match", "places", "as it is", "cascade", "the exit's"), texts, num_names=1))


if __name__ == "__main__":
    main()
