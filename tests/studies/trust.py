"""How far replace-1-block scores predict whole children: sums of scores against measured KL of many children.

Run: `python -m tests.studies.trust [--children 12] [--tokens 2048]` where artifacts/ holds a parent, its corpus,
library, scores and costs. Children are random draws of the library at three sizes, so that their ranks within a size
are not those of their sizes, and searched ones of several sizes; each is composed block by block and measured on
validation sequences. Prints tables, writes docs/trust.svg. At the end pre-scores, which need no model: how far a
variant's output is from the parent's.
"""

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from storage.activations import BoundaryReader
from storage.corpus import read_documents, read_sequences
from storage.library import Library
from storage.model_config import ModelConfig
from storage.parent import Parent
from storage.paths import Paths
from storage.records import CostRow, ScoreRow
from storage.scenario import Setting
from storage.tables import read_costs, read_scores
from storage.variants import Replacement
from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, finish, panels, styled
from tasks.puzzle.costs.cost_table import subblocks
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.distill.losses import LOSSES, token_mse
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute, prepare_compute, resolve
from tasks.puzzle.model.head import Head, compare_with_parent
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.quality.evaluation import per_sequence
from tasks.puzzle.search.best_child import best_child
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.problem import Choice, Limit, Problem
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import parent_attention, parent_blocks, parent_ffn
from tasks.puzzle.standard_error import standard_error
from tasks.tensors.replacements import ReplacementWeights

BATCH = 4
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
"""Block parameters that searched children keep."""
RANDOM_SHARES = (0.85, 0.73, 0.57)
"""Block parameters that random children keep."""


def write_line(line: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(f"{line}\n")


@dataclass(frozen=True)
class Child:
    """A child, the KL that its scores predict, and how it was chosen."""

    how: str
    blocks: tuple[Replacement, ...]
    predicted: float


def random_children(scores: Scores, config: ModelConfig, share: float, count: int) -> list[Child]:
    """Draw random children of one size: replacements until the blocks keep `share` of the parent's parameters.

    A draw that would take more than a percent too much is left out.
    """
    rng, replacements = random.Random(round(100 * share)), scores.replacements("decoupled")
    parent = parent_blocks(config)
    parent_size = sum(_params(config, block) for block in parent)
    children: list[Child] = []
    while len(children) < count:
        blocks = {block.first_block: block for block in parent}
        size = parent_size
        for replacement in rng.sample(replacements, len(replacements)):
            replaced = [parent[index] for index in replacement.parent_blocks]
            smaller = size + _params(config, replacement) - sum(_params(config, block) for block in replaced)
            if all(blocks.get(block.first_block) == block for block in replaced) and (
                smaller >= (share - 0.01) * parent_size
            ):
                for block in replaced:
                    del blocks[block.first_block]
                blocks[replacement.first_block], size = replacement, smaller
            if size <= share * parent_size:
                break
        if size <= share * parent_size:
            chosen = tuple(blocks[index] for index in sorted(blocks))
            children.append(Child(f"random, {share:.0%}", chosen, scores.total(chosen, "decoupled").mean))
    return children


def searched_children(scores: Scores, config: ModelConfig) -> list[Child]:
    """Return the best child by score for each share of block parameters."""
    replacements = sorted({*parent_blocks(config), *scores.replacements("decoupled")})
    choices = tuple(Choice(block, scores.score(block, "decoupled").mean) for block in replacements)
    sizes = tuple(float(_params(config, block)) for block in replacements)
    parent_size = sum(_params(config, block) for block in parent_blocks(config))
    children = []
    for share in SHARES:
        limit = Limit("size", f"block_params <= {share}", sizes, 0.0, share * parent_size)
        best = best_child(Problem("score", config.num_blocks, choices, (limit,)), SolverSettings())
        blocks = tuple(sorted(choice.replacement for choice in best.solution.chosen))
        children.append(Child(f"searched, {share:.0%}", blocks, best.solution.objective))
    return children


def _params(config: ModelConfig, block: Replacement) -> int:
    return sum(component_sizes(config, component, name, "bfloat16").params for component, name in subblocks(block))


def measured(children: Sequence[Child], num_sequences: int, paths: Paths) -> list[list[float]]:
    """Measure the KL of each child on each validation sequence, nats/token."""
    kls: list[list[float]] = [[] for _ in children]
    device_name, dtype = resolve("auto", "auto")
    compute = prepare_compute(device_name, dtype, 2)
    parent = Parent(paths.parent)
    _, norm, lm_head = parent.outside(*compute)
    head = Head(norm, lm_head, parent.config.rms_norm_eps)
    reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
    for start in tqdm(range(0, num_sequences, BATCH), desc="measure", unit="batch"):
        rows = range(start, min(start + BATCH, num_sequences))
        tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", rows.start, rows.stop)).long()
        last = reader.read(rows).to(*compute)
        with torch.inference_mode():
            states = _last_states(children, tokens, compute, paths)
            losses = compare_with_parent(head, tokens.to(compute.device), last, states)
        for kl, child_losses in zip(kls, losses, strict=True):
            kl += [sequence.kl for sequence in per_sequence(child_losses)]
    return kls


def _last_states(children: Sequence[Child], tokens: torch.Tensor, compute: Compute, paths: Paths) -> list[torch.Tensor]:
    """Advance all children through the parent's blocks together, so that each replacement is read once."""
    parent, library = Parent(paths.parent), Library(paths.library)
    embedding, _, _ = parent.outside(*compute)
    streams = [torch.nn.functional.embedding(tokens.to(compute.device), embedding)] * len(children)
    for index in range(parent.config.num_blocks):
        weights = ReplacementWeights(parent, library, *compute)
        ready: dict[Replacement, Block] = {}
        for number, child in enumerate(children):
            replacement = next((block for block in child.blocks if block.first_block == index), None)
            if replacement is None:
                continue
            if replacement not in ready:
                ready[replacement] = _load(replacement, parent.config, weights)
            rotary = rotary_for(parent.config, tokens.shape[1], streams[number])
            streams[number] = ready[replacement](streams[number], rotary)
    return streams


def _load(replacement: Replacement, config: ModelConfig, weights: ReplacementWeights) -> Block:
    tensors = weights.tensors(replacement, "decoupled")
    return Block.load(config, replacement.attention, replacement.ffn, tensors)


def rank_correlation(first: Iterable[float], second: Iterable[float]) -> float:
    """Return Spearman's rank correlation."""
    return statistics.correlation(_ranks(list(first)), _ranks(list(second)))


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(rank) for _, rank in sorted(zip(order, range(len(values)), strict=True))]


@styled
def picture(children: Sequence[Child], kls: Sequence[list[float]], documents: Sequence[int]) -> str:
    """Draw predicted against measured KL, and their ratio, as SVG."""
    figure, (row,) = panels(1, 2, 4.4)
    means = [statistics.fmean(kl) for kl in kls]
    for word, colour, marker in (("random draws of the library", GREY, "o"), ("searched", ORANGE, "s")):
        numbers = [n for n, child in enumerate(children) if child.how.startswith(word.partition(" ")[0])]
        x, y = [children[n].predicted for n in numbers], [means[n] for n in numbers]
        errors = [standard_error(kls[n], documents) or 0.0 for n in numbers]
        row[0].errorbar(x, y, yerr=errors, fmt=marker, color=colour, label=word)
        row[1].plot(x, [b / a for a, b in zip(x, y, strict=True)], marker, color=colour)
    low = min(*means, *(child.predicted for child in children)) / 1.3
    high = max(*means, *(child.predicted for child in children)) * 1.3
    row[0].plot((low, high), (low, high), color=LINE, linewidth=0.8, zorder=0)
    row[0].set(
        xscale="log", yscale="log", xlabel="predicted: sum of scores, nats/token", ylabel="measured KL, nats/token"
    )
    row[0].set_title("On the line, scores add up")
    row[0].legend(loc="upper left")
    row[1].axhline(1.0, color=BLUE, linewidth=0.8)
    row[1].set(xscale="log", xlabel="predicted: sum of scores, nats/token", ylabel="measured / predicted")
    row[1].set_title("Where they do not")
    words = f"Predicted sum of scores against measured KL of {len(children)} children."
    return finish(figure, "trust", words, 100).svg


@dataclass(frozen=True)
class Rating:
    """A variant of a single block: its block, how far its output is from the parent's by one loss, and its score."""

    block_index: int
    loss: float
    score: float


def pre_score(scores: Scores, config: ModelConfig, paths: Paths) -> dict[Replacement, float]:
    """Print the rank correlation with the scores of how far a variant's output is from the parent's, on two sequences.

    Returns that error of each variant, token by token.
    """
    errors: dict[Replacement, float] = {}
    ratings: dict[str, list[Rating]] = {name: [] for name in LOSSES}
    device_name, dtype = resolve("auto", "auto")
    compute = prepare_compute(device_name, dtype, 2)
    variants = [
        replacement
        for replacement in scores.replacements("decoupled")
        if replacement.span == 1 and _changes_one_half(replacement, config)
    ]
    weights = ReplacementWeights(Parent(paths.parent), Library(paths.library), *compute)
    for variant in tqdm(variants, desc="pre-score", unit="variant"):
        index = variant.first_block
        source = BoundaryReader(paths.activations, "calibration", index).read([0, 1]).to(*compute)
        target = BoundaryReader(paths.activations, "calibration", index + 1).read([0, 1]).to(*compute)
        with torch.inference_mode():
            output = _load(variant, config, weights)(source, rotary_for(config, source.shape[1], source))
        errors[variant] = float(token_mse(output, target))
        score = scores.score(variant, "decoupled").mean
        for name, loss in LOSSES.items():
            ratings[name].append(Rating(index, float(loss(output, target)), score))
    write_line(
        f"\nrank correlation with the scores of {len(variants)} variants of single blocks; within a block (median)"
    )
    for name, rows in ratings.items():
        per_block = [[row for row in rows if row.block_index == index] for index in range(config.num_blocks)]
        within = statistics.median(_correlation_with_scores(block_rows) for block_rows in per_block)
        write_line(f"  {name:<16} {_correlation_with_scores(rows):.3f} {within:>8.3f}")
    return errors


def _correlation_with_scores(ratings: Sequence[Rating]) -> float:
    return rank_correlation((rating.loss for rating in ratings), (rating.score for rating in ratings))


def _changes_one_half(replacement: Replacement, config: ModelConfig) -> bool:
    return (replacement.attention == parent_attention(config)) != (replacement.ffn == parent_ffn(config))


def hopeless(
    rows: Iterable[ScoreRow], errors: Mapping[Replacement, float], costs: Sequence[CostRow], config: ModelConfig
) -> None:
    """Count the variants that another of their subblock, no larger nor slower, beats: by score, and by error."""
    kls: dict[Replacement, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.sequence_shard):
        if row.replacement in errors:
            kls.setdefault(row.replacement, []).append(row.kl)
    by_score: set[Replacement] = set()
    by_error: set[Replacement] = set()
    for variant, kl in kls.items():
        rivals = [other for other in kls if other != variant and _same_subblock(variant, other, config)]
        smaller = [other for other in rivals if _costs_no_more(other, variant, costs, config)]
        if any(statistics.fmean(kls[other]) < statistics.fmean(kl) for other in smaller):
            by_score.add(variant)
        if any(errors[other] < errors[variant] for other in smaller):
            by_error.add(variant)
    write_line(
        f"\nbeaten by one that is no larger nor slower, of {len(kls)}: {len(by_score)} by score; {len(by_error)} by "
        f"error (token_mse), {len(by_error & by_score)} of them by score too"
    )


def _costs(replacement: Replacement, costs: Sequence[CostRow], config: ModelConfig) -> dict[str, float]:
    """Return costs of the subblock that is not the parent's: sizes, and milliseconds in every measured setting."""
    component, name = subblocks(replacement)[0 if replacement.ffn == parent_ffn(config) else 1]
    sizes = component_sizes(config, component, name, "bfloat16")
    taken: dict[str, float] = {"params": sizes.params, "kv": sizes.kv_bytes_per_token}
    for row in costs:
        if (row.component, row.variant, row.span, row.origin) == (component, name, 1, "measured"):
            setting = str(Setting.from_row(row))
            taken[f"prefill {setting}"], taken[f"decode {setting}"] = row.prefill_ms, row.decode_ms
    return taken


def _same_subblock(variant: Replacement, other: Replacement, config: ModelConfig) -> bool:
    full_ffn = parent_ffn(config)
    return variant.first_block == other.first_block and (variant.ffn == full_ffn) == (other.ffn == full_ffn)


def _costs_no_more(variant: Replacement, other: Replacement, costs: Sequence[CostRow], config: ModelConfig) -> bool:
    """Tell whether a variant takes no more than another of anything that both have a cost of."""
    taken, others = _costs(variant, costs, config), _costs(other, costs, config)
    return all(taken[name] <= others[name] for name in taken.keys() & others.keys())


def print_children(
    children: Sequence[Child], kls: Sequence[list[float]], documents: Sequence[int], config: ModelConfig
) -> None:
    """Print a row for each child, and for all, random and searched ones how well the scores predict them."""
    write_line(f"{'how':<16} {'replaced':>8} {'spans':>6} {'predicted':>10} {'measured':>17} {'ratio':>6}")
    for child, kl in sorted(zip(children, kls, strict=True), key=lambda pair: pair[0].predicted):
        changed = [block for block in child.blocks if block not in parent_blocks(config)]
        mean, error = statistics.fmean(kl), standard_error(kl, documents) or 0.0
        write_line(
            f"{child.how:<16} {sum(block.span for block in changed):>8} {sum(block.span > 1 for block in changed):>6} "
            f"{child.predicted:>10.3f} {mean:>9.3f} ± {error:.3f} {mean / child.predicted:>6.2f}"
        )
    for kind in (*(f"random, {share:.0%}" for share in RANDOM_SHARES), "random", "searched"):
        numbers = [number for number, child in enumerate(children) if child.how.startswith(kind)]
        predicted = [children[number].predicted for number in numbers]
        means = [statistics.fmean(kls[number]) for number in numbers]
        ratios = sorted(mean / score for score, mean in zip(predicted, means, strict=True))
        write_line(
            f"{kind}: {len(numbers)} children, predicted {min(predicted):.2f} to {max(predicted):.2f}, "
            f"rank correlation {rank_correlation(predicted, means):.3f}, "
            f"measured / predicted {statistics.median(ratios):.2f} (median), {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.trust", description=__doc__)
    parser.add_argument("--children", type=int, default=12, help="random ones of each size; searched ones come on top")
    parser.add_argument("--tokens", type=int, default=2048, help="validation tokens of each")
    arguments = parser.parse_args()
    paths = Paths()
    config = Parent(paths.parent).config
    rows = read_scores(paths.scores)
    scores = Scores.from_rows(rows, config)
    drawn = (random_children(scores, config, share, arguments.children) for share in RANDOM_SHARES)
    children = [*itertools.chain.from_iterable(drawn), *searched_children(scores, config)]
    num_sequences = arguments.tokens // read_sequences(paths.corpus, "validation", 0, 1).shape[1]
    documents = read_documents(paths.corpus, "validation", 0, num_sequences).tolist()
    kls = measured(children, num_sequences, paths)
    print_children(children, kls, documents, config)
    Path("docs/trust.svg").write_text(picture(children, kls, documents), encoding="utf-8")
    hopeless(rows, pre_score(scores, config, paths), read_costs(paths.costs), config)


if __name__ == "__main__":
    main()
