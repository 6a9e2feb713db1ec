"""The child's README.md (model card) and the architecture as a table. No torch."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from storage.records import Architecture


def architecture_table(architecture: Architecture) -> list[str]:
    """Lines of text, one per run of equal blocks: `blocks 3-7   kv_1      ffn_768`."""
    rows = [(block.parent_blocks, block.attention.name, block.ffn.name) for block in architecture.blocks]
    lines = [f"{'parent blocks':<14} {'attention':<10} ffn"]
    for (attention, ffn), run in groupby(rows, key=lambda row: row[1:]):
        covered = [index for parent_blocks, _, _ in run for index in parent_blocks]
        where = str(covered[0]) if len(covered) == 1 else f"{covered[0]}-{covered[-1]}"
        lines.append(f"{where:<14} {attention:<10} {ffn}")
    return lines


def model_card(
    chosen: Mapping[str, Any],
    architecture: Architecture,
    parent: Mapping[str, Any],
    hashes: Mapping[str, str],
    refusals: Mapping[str, Iterable[str]],
    training: str,
) -> str:
    """Markdown with front matter: what the child is, block by block, where it comes from, who loads it.

    Args:
        chosen: architecture.json.
        architecture: its blocks.
        parent: puzzle_parent.json.
        hashes: provenance, name -> sha256.
        refusals: runtime -> reasons why it cannot load the checkpoint.
        training: how the weights came about, a sentence.
    """
    predicted = chosen["predicted"]
    loads = {"llama.cpp": "loads it once it is exported to GGUF"}
    runtimes = [
        f"- {name}: {'no: ' + '; '.join(reasons) if reasons else loads.get(name, 'loads it')}"
        for name, reasons in refusals.items()
    ]
    provenance = [f"- {name}: `{digest}`" for name, digest in hashes.items()]
    licence_files = ", ".join(parent["licence_files"]) or "none came with the parent"
    return "\n".join(
        [
            "---",
            f"license: {parent['licence']}",
            f"base_model: {parent['name']}",
            "library_name: transformers",
            "tags: [puzzle, nemotron-nas, pruning, distillation]",
            "---",
            f"# {parent['name']}, {chosen['label']}",
            "",
            f"A child of {parent['name']} ({parent['source']}), made with Puzzle (arXiv 2411.19146):",
            f"{predicted['params']:,} parameters, {predicted['params_ratio']:.1%} of the parent's; of its blocks' "
            f"parameters {predicted['block_params_ratio']:.1%}, of its KV cache {predicted['kv_ratio']:.1%}.",
            training,
            "",
            "## Architecture",
            "",
            "```",
            *architecture_table(architecture),
            "```",
            "",
            "## Load it",
            "",
            "```python",
            "import tasks.puzzle.child  # registers the class; no remote code",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
            "```",
            "",
            "Stock runtimes (llama.cpp was run, the loaders of the others were read):",
            "",
            *runtimes,
            "",
            "## Provenance",
            "",
            *provenance,
            "",
            f"Licence of the parent: {parent['licence']} (files: {licence_files}).",
            "",
        ]
    )
