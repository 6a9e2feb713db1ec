"""The path of every artifact, relative to the folder that DVC runs in."""

from dataclasses import dataclass, field
from pathlib import Path

from storage.sections import Storage

TIMINGS = Path("storage/timings")
EXPORTS_OVERVIEW = "exports.json"
"""In a folder of exports: files of every format with sizes and checksums, and what each runtime takes."""


@dataclass(frozen=True)
class Paths:
    """Paths of the artifacts under `root` (`artifacts/` of the working directory unless a test says otherwise).

    With `storage.root` the folders of activations and library are those of a cache, and what is finished in them is
    kept in the bucket (storage/stores.py).
    """

    root: Path = Path("artifacts")
    storage: Storage = field(default_factory=lambda: Storage.model_validate({}))

    @property
    def parent(self) -> Path:
        """Return the folder of the parent's Hugging Face checkpoint."""
        return self.root / "parent"

    @property
    def written(self) -> Path:
        """Return the folder of the texts and chats that the parent wrote for the corpus."""
        return self.root / "written"

    @property
    def corpus(self) -> Path:
        """Return the folder of packed token sequences."""
        return self.root / "corpus"

    @property
    def activations(self) -> Path:
        """Return the folder of hidden states at block boundaries."""
        return self._kept("activations", reads_on=True)

    @property
    def parent_exports(self) -> Path:
        """Return the folder of the parent in the forms that runtimes load, to compare children with."""
        return self.root / "parent_exports"

    @property
    def rolling(self) -> Path:
        """Return the folder of boundaries that a rolling stage holds, a folder each; it deletes them when it ends."""
        return self.root / "rolling"

    @property
    def library(self) -> Path:
        """Return the folder of the replacement library."""
        return self._kept("library", reads_on=False)

    @property
    def library_index(self) -> Path:
        """Return the table of the library's entries and their losses."""
        return self.root / "library" / "index.parquet"

    @property
    def scores(self) -> Path:
        """Return the table of replace-1-block scores, a row per (replacement, calibration sequence)."""
        return self.root / "scores.parquet"

    @property
    def score_pieces(self) -> Path:
        """Return the folder of finished pieces of score_blocks."""
        return self.root / "score_pieces"

    @property
    def costs(self) -> Path:
        """Return the table of costs, a row per (component, variant, hardware, engine, precision, scenario, batch)."""
        return self.root / "costs.parquet"

    def child(self, target: str) -> Path:
        """Return the folder of all artifacts of one target."""
        return self.root / "children" / target

    def architecture(self, target: str) -> Path:
        """Return the file of the architecture that the search chose."""
        return self.child(target) / "architecture.json"

    def search(self, target: str) -> Path:
        """Return the file of the search's course: solver, bound, gap, times, binding limits."""
        return self.child(target) / "search.json"

    def baselines(self, target: str) -> Path:
        """Return the file of the architectures that simpler searches chose."""
        return self.child(target) / "baselines.json"

    def assembled(self, target: str) -> Path:
        """Return the folder of the child's checkpoint before global distillation."""
        return self.child(target) / "assembled"

    def refined(self, target: str) -> Path:
        """Return the folder of the child's checkpoint after its correction in closed form, before distillation."""
        return self.child(target) / "refined"

    def refinement(self, target: str) -> Path:
        """Return the file of the correction's course, block by block."""
        return self.child(target) / "refine.json"

    def refine_state(self, target: str) -> Path:
        """Return the folder of a correction under way; it is deleted when the correction is finished."""
        return self.child(target) / ".refine"

    def distilled(self, target: str) -> Path:
        """Return the folder of the child's checkpoint after global distillation."""
        return self.child(target) / "distilled"

    def exports(self, target: str) -> Path:
        """Return the folder of the distilled child in the forms that runtimes load: a folder for each format."""
        return self.child(target) / "exports"

    def gkd(self, target: str) -> Path:
        """Return the file of global distillation's losses, step by step."""
        return self.child(target) / "gkd.json"

    def gkd_state(self, target: str) -> Path:
        """Return the folder of a distillation under way; it is deleted when the distillation is finished."""
        return self.child(target) / ".gkd"

    def evaluation(self, target: str) -> Path:
        """Return the file of parent's and child's quality and speed, measured and predicted."""
        return self.child(target) / "evaluation.json"

    def throughput(self, target: str) -> Path:
        """Return the table of parent's and child's tokens per second: measured, predicted, modelled."""
        return self.child(target) / "throughput.parquet"

    def accuracy(self, target: str) -> Path:
        """Return the file of parent's and child's accuracy on the benchmarks that params name."""
        return self.child(target) / "accuracy.json"

    @property
    def answers(self) -> Path:
        """Return the folder of models' answers, a file for each model and benchmark, so that none is asked twice."""
        return self.root / "answers"

    def frontier(self, target: str) -> Path:
        """Return the path, without suffix, of a table and a figure of quality against the metric of a constraint."""
        return self.root / "frontier" / target

    @property
    def serving(self) -> Path:
        """Return the table of servers' speed under load, with figures beside it; no stage reads it."""
        return self.root / "serving.parquet"

    @property
    def seconds(self) -> Path:
        """Return the file of each stage's seconds here, without imports, for `puzzle plan`; no stage reads it."""
        return self.root / "seconds.json"

    @property
    def report(self) -> Path:
        """Return the folder of the page about all targets, and its figures."""
        return self.root / "report"

    def _kept(self, name: str, reads_on: bool) -> Path:
        """Return the folder that a stage writes and reads the files of its pieces in."""
        if self.storage.root is None:
            return self.root / name
        from storage.bucket_store import keep_in_bucket  # here, since S3's client takes half a second to import

        return keep_in_bucket(name, self.root, self.storage.root, self.storage.cache_gib, reads_on)
