"""How far replace-1-block scores predict whole children: sums of scores against measured KL of many children.

Run: `python -m tests.studies.trust [--children 48] [--tokens 2048]` where artifacts/ holds a parent, its corpus,
library and scores. Children are random draws of the library, with few to all blocks replaced, and searched ones of
several sizes; each is composed block by block and measured on validation sequences. Prints tables, writes
docs/trust.svg. At the end pre-scores, which need no model: how far a variant's output is from the parent's.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from storage.activations import BoundaryReader
from storage.corpus import read_sequences
from storage.library import Library
from storage.model_config import ModelConfig
from storage.parent import Parent
from storage.paths import Paths
from storage.records import Replacement, ScoreRow
from storage.tables import read_scores
from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, finish, panels, styled
from tasks.puzzle.blocks import Block
from tasks.puzzle.costs import subblocks
from tasks.puzzle.device import Compute, compute, resolve
from tasks.puzzle.evaluation import per_sequence, standard_error
from tasks.puzzle.head import Head, compare_with_parent
from tasks.puzzle.losses import LOSSES, token_mse
from tasks.puzzle.mip import Settings
from tasks.puzzle.problem import Choice, Limit, Problem
from tasks.puzzle.rotary import rotary_for
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.search import best_child
from tasks.puzzle.stopping import LEAST_SEQUENCES, Contender, is_dominated
from tasks.puzzle.variants import component_sizes, parent_attention, parent_blocks, parent_ffn
from tasks.replacements import Replacements

BATCH = 4
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
"""Block parameters that searched children keep."""


def say(line: str) -> None:
    """To the terminal."""
    sys.stdout.write(f"{line}\n")


@dataclass(frozen=True)
class Child:
    """A child, what the scores predict for it, and how it was found."""

    how: str
    blocks: tuple[Replacement, ...]
    predicted: float


def random_children(scores: Scores, config: ModelConfig, count: int) -> list[Child]:
    """From 2 blocks replaced to all of them; single blocks and spans as they come."""
    rng, parent, found = random.Random(0), parent_blocks(config), scores.replacements("decoupled")
    children = []
    for number in range(count):
        wanted = max(2, round(config.num_blocks * (number + 1) / count))
        blocks = {block.first_block: block for block in parent}
        for replacement in rng.sample(found, len(found)):
            if all(blocks.get(index) == parent[index] for index in replacement.parent_blocks):
                for index in replacement.parent_blocks:
                    del blocks[index]
                blocks[replacement.first_block] = replacement
            if sum(block.span for block in blocks.values() if block not in parent) >= wanted:
                break
        chosen = tuple(blocks[index] for index in sorted(blocks))
        children.append(Child("random", chosen, scores.total(chosen, "decoupled").mean))
    return children


def searched_children(scores: Scores, config: ModelConfig) -> list[Child]:
    """The best by score for each share of block parameters."""
    everything = sorted({*parent_blocks(config), *scores.replacements("decoupled")})
    choices = tuple(Choice(of, scores.score(of, "decoupled").mean) for of in everything)
    sizes = tuple(float(_params(config, of)) for of in everything)
    whole = sum(_params(config, of) for of in parent_blocks(config))
    children = []
    for share in SHARES:
        limit = Limit("size", f"block_params <= {share}", sizes, 0.0, share * whole)
        best = best_child(Problem("score", config.num_blocks, choices, (limit,)), Settings())
        blocks = tuple(sorted(of.replacement for of in best.solution.chosen))
        children.append(Child(f"searched, {share:.0%}", blocks, best.solution.objective))
    return children


def _params(config: ModelConfig, of: Replacement) -> int:
    return sum(component_sizes(config, component, name, "bfloat16").params for component, name in subblocks(of))


def measured(children: Sequence[Child], num_sequences: int, paths: Paths) -> list[list[float]]:
    """KL of each child on each validation sequence, nats/token."""
    found: list[list[float]] = [[] for _ in children]
    device_name, dtype = resolve("auto", "auto")
    device = compute(device_name, dtype, 2)
    parent = Parent(paths.parent)
    _, norm, lm_head = parent.outside(device.device, device.dtype)
    head = Head(norm, lm_head, parent.config.rms_norm_eps)
    reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
    for start in tqdm(range(0, num_sequences, BATCH), desc="measure", unit="batch"):
        rows = range(start, min(start + BATCH, num_sequences))
        tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", rows.start, rows.stop)).long()
        last = reader.read(rows).to(device.device, device.dtype)
        with torch.inference_mode():
            states = _last_states(children, tokens, device, paths)
            losses = compare_with_parent(head, tokens.to(device.device), last, states)
        for kl, of_child in zip(found, losses, strict=True):
            kl += [one.kl for one in per_sequence(of_child)]
    return found


def _last_states(children: Sequence[Child], tokens: torch.Tensor, device: Compute, paths: Paths) -> list[torch.Tensor]:
    """All children advance through the parent's blocks together, so that each replacement is read once."""
    parent, library = Parent(paths.parent), Library(paths.library)
    embedding, _, _ = parent.outside(device.device, device.dtype)
    streams = [torch.nn.functional.embedding(tokens.to(device.device), embedding)] * len(children)
    for index in range(parent.config.num_blocks):
        read, ready = Replacements(parent, library, device.device, device.dtype), {}
        for number, child in enumerate(children):
            of = next((block for block in child.blocks if block.first_block == index), None)
            if of is None:
                continue
            if of not in ready:
                ready[of] = Block.load(parent.config, of.attention, of.ffn, read.tensors(of, "decoupled"))
            streams[number] = ready[of](streams[number], rotary_for(parent.config, tokens.shape[1], streams[number]))
    return streams


def rank_correlation(one: Iterable[float], other: Iterable[float]) -> float:
    """Spearman's."""
    first, second = (_ranks(list(values)) for values in (one, other))
    return statistics.correlation(first, second)


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(rank) for _, rank in sorted(zip(order, range(len(values)), strict=True))]


@styled
def picture(children: Sequence[Child], kls: Sequence[list[float]]) -> str:
    """Predicted against measured, and how far off, as SVG."""
    figure, (row,) = panels(1, 2, 4.4)
    means = [statistics.fmean(kl) for kl in kls]
    for word, colour, marker in (("random draws of the library", GREY, "o"), ("searched", ORANGE, "s")):
        own = [n for n, child in enumerate(children) if child.how.startswith(word.partition(" ")[0])]
        x, y = [children[n].predicted for n in own], [means[n] for n in own]
        row[0].errorbar(x, y, yerr=[standard_error(kls[n]) for n in own], fmt=marker, color=colour, label=word)
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


def pre_score(scores: Scores, config: ModelConfig, paths: Paths) -> dict[Replacement, float]:
    """Rank correlation with the scores of how far a variant's output is from the parent's, on two sequences.

    Returns that error of each variant, token by token.
    """
    errors: dict[Replacement, float] = {}
    pairs: dict[str, list[tuple[int, float, float]]] = {name: [] for name in LOSSES}
    device_name, dtype = resolve("auto", "auto")
    device = compute(device_name, dtype, 2)
    found = [of for of in scores.replacements("decoupled") if of.span == 1 and _changes_one_half(of, config)]
    read = Replacements(Parent(paths.parent), Library(paths.library), device.device, device.dtype)
    for of in tqdm(found, desc="pre-score", unit="variant"):
        source, target = (
            BoundaryReader(paths.activations, "calibration", at).read([0, 1]).to(device.device, device.dtype)
            for at in (of.first_block, of.first_block + 1)
        )
        with torch.inference_mode():
            block = Block.load(config, of.attention, of.ffn, read.tensors(of, "decoupled"))
            output = block(source, rotary_for(config, source.shape[1], source))
        errors[of] = float(token_mse(output, target))
        for name, loss in LOSSES.items():
            pairs[name].append((of.first_block, float(loss(output, target)), scores.score(of, "decoupled").mean))
    say(f"\nrank correlation with the scores of {len(found)} variants of single blocks; within a block (median)")
    for name, rows in pairs.items():
        everything = rank_correlation(*([row[at] for row in rows] for at in (1, 2)))
        within = [
            rank_correlation(*([row[at] for row in rows if row[0] == index] for at in (1, 2)))
            for index in range(config.num_blocks)
        ]
        say(f"  {name:<16} {everything:.3f} {statistics.median(within):>8.3f}")
    return errors


def _changes_one_half(of: Replacement, config: ModelConfig) -> bool:
    return (of.attention == parent_attention(config)) != (of.ffn == parent_ffn(config))


def hopeless(rows: Iterable[ScoreRow], errors: Mapping[Replacement, float], config: ModelConfig) -> None:
    """Variants that one of their subblock, no larger, beats: by score, by error, and by drop_dominated's rule."""
    kls: dict[Replacement, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.sequence_shard):
        if row.replacement in errors:
            kls.setdefault(row.replacement, []).append(row.kl)
    found: dict[str, set[Replacement]] = {"score": set(), "error": set(), "rule": set()}
    for of, kl in kls.items():
        one = _contender(of, kl[:LEAST_SEQUENCES], config)
        rivals = [other for other in kls if other != of and _same_subblock(of, other, config)]
        smaller = [other for other in rivals if _is_no_larger(other, of, config)]
        if any(statistics.fmean(kls[other]) < statistics.fmean(kl) for other in smaller):
            found["score"].add(of)
        if any(errors[other] < errors[of] for other in smaller):
            found["error"].add(of)
        if is_dominated(one, (_contender(other, kls[other][:LEAST_SEQUENCES], config) for other in smaller)):
            found["rule"].add(of)
    both = {name: len(found[name] & found["score"]) for name in ("error", "rule")}
    say(
        f"\nbeaten by one that is no larger, of {len(kls)}: {len(found['score'])} by score; {len(found['error'])} by "
        f"error (token_mse), {both['error']} of them by score too; {len(found['rule'])} by drop_dominated on "
        f"{LEAST_SEQUENCES} sequences, {both['rule']} of them by score on all too"
    )


def _contender(of: Replacement, kl: Sequence[float], config: ModelConfig) -> Contender:
    component, name = subblocks(of)[0 if of.ffn == parent_ffn(config) else 1]
    sizes = component_sizes(config, component, name, "bfloat16")
    return Contender(sizes.params, sizes.kv_bytes_per_token, tuple(kl))


def _same_subblock(one: Replacement, other: Replacement, config: ModelConfig) -> bool:
    own = parent_ffn(config)
    return one.first_block == other.first_block and (one.ffn == own) == (other.ffn == own)


def _is_no_larger(one: Replacement, other: Replacement, config: ModelConfig) -> bool:
    mine, theirs = (_contender(of, (), config) for of in (one, other))
    return mine.params <= theirs.params and mine.kv_bytes <= theirs.kv_bytes


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.trust", description=__doc__)
    parser.add_argument("--children", type=int, default=48, help="random ones; the searched ones come on top")
    parser.add_argument("--tokens", type=int, default=2048, help="validation tokens of each")
    arguments = parser.parse_args()
    paths = Paths()
    config = Parent(paths.parent).config
    rows = read_scores(paths.scores)
    scores = Scores.of(rows, config)
    children = [*random_children(scores, config, arguments.children), *searched_children(scores, config)]
    seq_len = read_sequences(paths.corpus, "validation", 0, 1).shape[1]
    kls = measured(children, arguments.tokens // seq_len, paths)
    say(f"{'how':<16} {'replaced':>8} {'spans':>6} {'predicted':>10} {'measured':>17} {'ratio':>6}")
    for child, kl in sorted(zip(children, kls, strict=True), key=lambda pair: pair[0].predicted):
        changed = [of for of in child.blocks if of not in parent_blocks(config)]
        mean = statistics.fmean(kl)
        say(
            f"{child.how:<16} {sum(of.span for of in changed):>8} {sum(of.span > 1 for of in changed):>6} "
            f"{child.predicted:>10.3f} {mean:>9.3f} ± {standard_error(kl):.3f} {mean / child.predicted:>6.2f}"
        )
    means = [statistics.fmean(kl) for kl in kls]
    for word in ("", "random", "searched"):
        own = [n for n, child in enumerate(children) if child.how.startswith(word)]
        predicted, found = [children[n].predicted for n in own], [means[n] for n in own]
        ratios = sorted(b / a for a, b in zip(predicted, found, strict=True))
        say(
            f"{word or 'all'}: {len(own)} children, rank correlation {rank_correlation(predicted, found):.3f}, "
            f"measured / predicted {statistics.median(ratios):.2f} (median), {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
    Path("docs/trust.svg").write_text(picture(children, kls), encoding="utf-8")
    hopeless(rows, pre_score(scores, config, paths), config)


if __name__ == "__main__":
    main()
