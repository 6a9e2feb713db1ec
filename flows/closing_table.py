"""What `make demo` prints last: the children beside the parent, as measured. Run: `python -m flows.closing_table`."""

import sys
from typing import Any

from flows.stage import run_cleanly
from storage.files import read_json
from storage.params import load
from storage.paths import Paths


def closing_table(paths: Paths, targets: list[str]) -> str:
    """Quality and constraints of every child, from evaluation.json and architecture.json; fits 100 columns."""
    titles = f"{'model':<19} {'params':>12} {'KL':>15} {'perplexity':>11} {'top-1':>7} {'score sum':>10}"
    lines = [f"{titles} {'decode':>13}"]
    notes = []
    for position, target in enumerate(targets):
        evaluation = read_json(paths.evaluation(target), f"dvc repro evaluate_child@{target}")
        predicted = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")["predicted"]
        if position == 0:
            parent_params = round(predicted["params"] / predicted["params_ratio"])
            lines.append(_row("parent", parent_params, evaluation["parent"], None, "1.00 x"))
        label, score = evaluation["label"], evaluation["predicted"]["score"]
        lines.append(
            _row(f"{label} assembled", predicted["params"], evaluation["assembled"], score, _decode(evaluation))
        )
        lines.append(_row(f"{label} distilled", predicted["params"], evaluation["distilled"], None, ""))
        notes += ["", *_constraints(evaluation), *_speeds(evaluation), *_baselines(evaluation), *_exports(evaluation)]
        notes.append(f"  {paths.exports(target)}")
    return "\n".join([*lines, *notes, ""])


def _row(name: str, params: int, quality: dict[str, Any], score: float | None, decode: str) -> str:
    kl = f"{quality['kl']:.3f} ± {quality['kl_stderr']:.3f}"
    predicted = f"{score:.3f}" if score is not None else ""
    return (
        f"{name:<19} {params:>12,} {kl:>15} {quality['perplexity']:>11.2f} "
        f"{quality['top1_agreement']:>7.1%} {predicted:>10} {decode:>13}"
    )


def _decode(evaluation: dict[str, Any]) -> str:
    """Tokens/s where the first speed limit holds, over those of the parent that was timed beside it."""
    if not evaluation["speed"]:
        return ""
    child, parent = (evaluation["speed"][name]["decode_throughput"] for name in ("assembled", "parent"))
    return f"{child / parent:.2f} x"


def _constraints(evaluation: dict[str, Any]) -> list[str]:
    """Limit, what the tables predicted, what was measured on the assembled child."""
    lines = [f"{evaluation['label']}: {'constraint':<20} {'limit':>9} {'predicted':>10} {'measured':>9}"]
    for one in evaluation["constraints"]:
        sign = ">=" if one["kind"] == "at_least" else "<="
        measured = "-" if one["measured"] is None else f"{one['measured']:.3f}"
        name = f"{one['metric']} ({one['name']})"
        text = f"  {name:<28} {sign}{one['limit']:>7.3f} {one['predicted']:>10.3f} {measured:>9}  {one['unit']}"
        lines.append(text + "  MISSED" * _is_missed(one))
    speed = evaluation["speed"]
    if speed:
        where = "the timed machine" if speed["is_timed_machine"] else f"NOT the timed machine {speed['hardware']}"
        lines.append(f"  speed measured at {speed['scenario']}, batch {speed['batch']}, on {where}:")
        lines.append(f"    {speed['machine']}")
    return lines


def _is_missed(constraint: dict[str, Any]) -> bool:
    """Whether what was measured is on the wrong side of the limit."""
    measured, limit = constraint["measured"], constraint["limit"]
    if measured is None:
        return False
    return bool(measured < limit if constraint["kind"] == "at_least" else measured > limit)


def _speeds(evaluation: dict[str, Any]) -> list[str]:
    """Child over parent in every engine and batch, measured, and beside it what the tables predict."""
    lines, last = [], ""
    for one in evaluation["speeds"]:
        setting = f"{one['engine']}, {one['precision']}, {one['scenario']}"
        if setting != last:
            lines.append(
                f"  {f'times the parent ({setting})':<44} {'measured':>9} {'spread':>7} {'predicted':>10} "
                f"{'bytes':>7} {'drift':>7}"
            )
            last = setting
        phase = {"prefill": "prompt tokens/s", "decode": "decode tokens/s"}[one["phase"]]
        predicted, *rest = (f"{one[key]:.3f}" if one[key] else "-" for key in ("predicted", "read_bytes", "drift"))
        lines.append(
            f"    {phase}, batch {one['batch']:<20} {one['measured']:>9.3f} {one['measured_spread']:>7.1%} "
            f"{predicted:>10} {' '.join(f'{one:>7}' for one in rest)}"
        )
    lines.append("    (bytes: what a decode step reads, parent over child; drift: the parent's speed as measured here")
    lines.append("    over what the timings in git predict)")
    return lines if last else []


def _exports(evaluation: dict[str, Any]) -> list[str]:
    """How far each GGUF is from the child in torch."""
    formats = evaluation["exports"]["formats"]
    lines = [
        f"    {name:<12} KL {one['kl']:.6f} ± {one['kl_stderr']:.6f}, perplexity {one['perplexity']:.3f} "
        f"(torch {one['torch_perplexity']:.3f})"
        for name, one in formats.items()
    ]
    tokens = evaluation["exports"]["tokens"]
    return [f"  exported, in llama.cpp against torch on {tokens:,} tokens:", *lines] if lines else []


def _baselines(evaluation: dict[str, Any]) -> list[str]:
    """How much worse each baseline is than the assembled child on the same sequences, KL in nats/token."""
    shown = [
        f"{name} {one['kl_difference']:+.3f} ± {one['stderr']:.3f}"
        for name, one in evaluation["paired"].items()
        if name in evaluation["baselines"]
    ]
    lines = [", ".join(shown[start : start + 3]) for start in range(0, len(shown), 3)]
    return ["  KL of baselines less the child's:", *(f"    {line}" for line in lines)] if lines else []


if __name__ == "__main__":
    run_cleanly(lambda: sys.stdout.write(closing_table(Paths(), list(load().targets))))
