"""The path of every artifact, relative to the folder that DVC runs in."""

from dataclasses import dataclass
from pathlib import Path

TIMINGS = Path("storage/timings")
EXPORTS_OVERVIEW = "exports.json"
"""In a folder of exports: files of every format with sizes and checksums, and what each runtime takes."""


@dataclass(frozen=True)
class Paths:
    """Paths of the artifacts under `root` (`artifacts/` of the working directory unless a test says otherwise)."""

    root: Path = Path("artifacts")

    @property
    def parent(self) -> Path:
        """Hugging Face checkpoint of the parent."""
        return self.root / "parent"

    @property
    def written(self) -> Path:
        """Texts and chats that the parent wrote for the corpus."""
        return self.root / "written"

    @property
    def corpus(self) -> Path:
        """Packed token sequences."""
        return self.root / "corpus"

    @property
    def activations(self) -> Path:
        """Hidden states at block boundaries."""
        return self.root / "activations"

    @property
    def parent_exports(self) -> Path:
        """The parent in the forms that runtimes load, to compare children with."""
        return self.root / "parent_exports"

    @property
    def rolling(self) -> Path:
        """Boundaries that a stage in rolling mode holds, a folder each; the stage deletes them when it ends."""
        return self.root / "rolling"

    @property
    def library(self) -> Path:
        """Replacement library."""
        return self.root / "library"

    @property
    def scores(self) -> Path:
        """Replace-1-block scores, a row per (replacement, calibration sequence)."""
        return self.root / "scores.parquet"

    @property
    def score_pieces(self) -> Path:
        """Finished pieces of score_blocks."""
        return self.root / "score_pieces"

    @property
    def costs(self) -> Path:
        """Costs, a row per (component, variant, hardware, engine, precision, scenario, batch)."""
        return self.root / "costs.parquet"

    def child(self, target: str) -> Path:
        """Folder of all artifacts of one target."""
        return self.root / "children" / target

    def architecture(self, target: str) -> Path:
        """The architecture that the search chose."""
        return self.child(target) / "architecture.json"

    def search(self, target: str) -> Path:
        """The course of the search: solver, bound, gap, times, binding limits."""
        return self.child(target) / "search.json"

    def baselines(self, target: str) -> Path:
        """The architectures that simpler searches chose."""
        return self.child(target) / "baselines.json"

    def assembled(self, target: str) -> Path:
        """The child's checkpoint before global distillation."""
        return self.child(target) / "assembled"

    def refined(self, target: str) -> Path:
        """The child's checkpoint after its correction in closed form, before global distillation."""
        return self.child(target) / "refined"

    def refinement(self, target: str) -> Path:
        """The course of the correction, block by block."""
        return self.child(target) / "refine.json"

    def refine_state(self, target: str) -> Path:
        """Blocks and states of a correction under way; it is deleted when the correction is finished."""
        return self.child(target) / ".refine"

    def distilled(self, target: str) -> Path:
        """The child's checkpoint after global distillation."""
        return self.child(target) / "distilled"

    def exports(self, target: str) -> Path:
        """The distilled child in the forms that runtimes load: a folder for each format."""
        return self.child(target) / "exports"

    def gkd(self, target: str) -> Path:
        """Losses of global distillation, step by step."""
        return self.child(target) / "gkd.json"

    def gkd_state(self, target: str) -> Path:
        """Checkpoint of a distillation under way; it is deleted when the distillation is finished."""
        return self.child(target) / ".gkd"

    def evaluation(self, target: str) -> Path:
        """Quality and speed of parent and child, measured and predicted."""
        return self.child(target) / "evaluation.json"

    def throughput(self, target: str) -> Path:
        """Tokens per second of parent and child: measured, predicted, modelled."""
        return self.child(target) / "throughput.parquet"

    def accuracy(self, target: str) -> Path:
        """Accuracy of parent and child on the tasks that params name."""
        return self.child(target) / "accuracy.json"

    @property
    def answers(self) -> Path:
        """Answers of models to benchmarks, a file for each model and benchmark, so that none is asked twice."""
        return self.root / "answers"

    def frontier(self, target: str) -> Path:
        """Quality against the metric of a constraint: the path of a table and of a figure, without suffix."""
        return self.root / "frontier" / target

    @property
    def serving(self) -> Path:
        """Speed of servers under load: a table, with figures beside it; no stage reads it."""
        return self.root / "serving.parquet"

    @property
    def seconds(self) -> Path:
        """Seconds that each stage took here, without its imports, for `puzzle plan`; no stage reads it."""
        return self.root / "seconds.json"

    @property
    def report(self) -> Path:
        """The page about all targets, and its figures."""
        return self.root / "report"
