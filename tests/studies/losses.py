"""What BLD should lower: three losses, some seeds, judged by the scores that their variants get.

Run: `python -m tests.studies.losses [--tokens 4096] [--seeds 3]` where artifacts/ holds a parent, its corpus and its
cache. For each loss and seed the whole library is trained on so many tokens, in a scratch folder, and scored on the
tokens that params give to trained weights. There is no closed-form start: it lowers the squared error, whichever loss
the steps lower, and after it they change little. A row per loss: the mean score over blocks and seeds of attention and
of FFN variants, and the sum of all scores as a mean over seeds with its standard deviation; then the loss with the
lower score, block by block.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from storage.params import Params, load
from storage.parent import Parent
from storage.paths import Paths
from storage.tables import read_scores
from storage.variants import Replacement
from tasks import distill_blocks, score_blocks
from tasks.engines.machine import on_this_machine
from tasks.puzzle.distill.losses import LOSSES
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import parent_attention


def scores_of(loss: str, seed: int, tokens: int, params: Params, paths: Paths) -> dict[Replacement, float]:
    """Train with one loss and seed; return the score of every trained variant, nats/token."""
    bld = params.distill_blocks.model_copy(update={"loss": loss, "tokens": tokens, "fit_tokens": 0})
    score = params.score_blocks.model_copy(update={"initial_tokens": 0, "depth_tokens": 0})
    run = params.run.model_copy(update={"seed": seed})
    params = params.model_copy(update={"distill_blocks": bld, "score_blocks": score, "run": run})
    _all(distill_blocks.train_block.fn, distill_blocks.plan_blocks.fn(params, paths), params, paths)
    _all(score_blocks.score_jobs.fn, score_blocks.plan_groups.fn(params, paths), params, paths)
    score_blocks.write_score_table.fn({}, params, paths)
    rows = [row for row in read_scores(paths.scores) if row.weights_hash]
    scores = Scores.from_rows(rows, Parent(paths.parent).config)
    return {
        replacement: scores.score(replacement, "decoupled").mean for replacement in {row.replacement for row in rows}
    }


def _all(work: Callable[..., Any], pieces: Sequence[Any], params: Params, paths: Paths) -> None:
    with ThreadPoolExecutor(params.run.workers) as pool:
        list(pool.map(lambda piece: work(piece, params, paths), pieces))


def main() -> None:
    """Train and score with every loss and seed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.losses", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each variant's steps")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each loss")
    arguments = parser.parse_args()
    params, whole = on_this_machine(load()), Paths()
    attention = parent_attention(Parent(whole.parent).config)
    scores: dict[str, list[dict[Replacement, float]]] = {loss: [] for loss in LOSSES}
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(Path(folder))
        for name in ("parent", "corpus", "activations"):
            (paths.root / name).symlink_to((whole.root / name).resolve())
        for loss in LOSSES:
            for seed in range(arguments.seeds):
                scores[loss].append(scores_of(loss, seed, arguments.tokens, params, paths))
                sys.stdout.write(f"{loss}, seed {seed}: sum of scores {sum(scores[loss][-1].values()):.3f}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{'loss':<16} {'attention':>10} {'FFN':>8} {'sum of scores':>20}\n")
    for loss, runs in scores.items():
        halves = []
        for changed in (True, False):
            pairs = [pair for run in runs for pair in run.items()]
            halves.append(statistics.fmean(kl for variant, kl in pairs if (variant.attention != attention) is changed))
        sums = [sum(run.values()) for run in runs]
        spread = statistics.stdev(sums) if len(sums) > 1 else 0.0
        sums_text = f"{statistics.fmean(sums):.3f} ± {spread:.3f}"
        sys.stdout.write(f"{loss:<16} {halves[0]:>10.4f} {halves[1]:>8.4f} {sums_text:>20}\n")
    first, *others = LOSSES
    for other in others:
        differences: list[float] = []
        for run, rival in zip(scores[first], scores[other], strict=True):
            differences += [rival[variant] - run[variant] for variant in run]
        better = statistics.fmean(difference < 0 for difference in differences)
        worse = statistics.fmean(difference > 0 for difference in differences)
        sys.stdout.write(f"{other} is better than {first} for {better:.0%} of the variants, worse for {worse:.0%}\n")


if __name__ == "__main__":
    main()
