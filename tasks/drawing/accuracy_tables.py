"""Tables of accuracy preserved on the page."""

from storage.accuracy import Accuracy
from tasks.drawing.accuracy_text import AT_CHANCE, range_text, share, share_of_parent
from tasks.drawing.numbers import NONE, with_error
from tasks.drawing.tables import Table


def accuracy_table(label: str, accuracy: Accuracy) -> Table:
    """Tabulate each benchmark and state of a child, columns in the announcement's order."""
    rows = [
        (
            benchmark.name,
            name,
            share(benchmark.parent, benchmark),
            share(child.accuracy, benchmark),
            AT_CHANCE if benchmark.parent_guesses else share_of_parent(child.preserved),
            share(child.difference, benchmark, sign="+"),
            share_of_parent(child.above_chance),
            f"{100 * benchmark.chance:.1f}" if benchmark.chance else NONE,
            f"{benchmark.questions:,}",
            benchmark.metric,
        )
        for benchmark in accuracy.benchmarks
        for name, child in benchmark.children.items()
    ]
    if accuracy.combined:
        blanks = (NONE,) * 6
        rows += [
            (
                "(10 x MT-Bench + MMLU) / 2",
                name,
                share_of_parent(accuracy.combined.parent),
                share_of_parent(quality),
                *blanks,
            )
            for name, quality in accuracy.combined.children.items()
        ]
    columns = (
        *("benchmark", "child", "parent, %", "child, %", "preserved, %", "child - parent", "above chance kept, %"),
        *("chance, %", "questions", "metric"),
    )
    caption = f"{label}: accuracy of parent and child on the same questions, {accuracy.dtype}; MT-Bench out of 10"
    return Table(caption, columns, rows, num_words=2)


def positions_table(label: str, accuracy: Accuracy) -> Table:
    """Tabulate by range of positions the parent's log-loss, and by how much each child's is higher."""
    states = list(accuracy.positions[0].children)
    rows = [
        (
            range_text(bucket),
            f"{bucket.tokens:,}",
            str(bucket.documents),
            f"{bucket.parent:.3f}",
            *(
                with_error(child.difference, child.difference_stderr, sign="+")
                for child in (bucket.children[state] for state in states)
            ),
        )
        for bucket in accuracy.positions
    ]
    columns = ("positions", "tokens", "documents", "parent", *(f"{state} - parent" for state in states))
    return Table(f"{label}: log-loss by position in a document, nats/token; ± clusters by document", columns, rows)
