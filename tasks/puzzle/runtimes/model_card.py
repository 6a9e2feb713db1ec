"""The child's README.md (model card) and its architecture as a table, as text. No torch."""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby

from storage.architecture import ChosenArchitecture
from storage.parent_info import ParentInfo
from storage.records import Runtime
from storage.variants import Architecture


def architecture_table(architecture: Architecture) -> list[str]:
    """Return lines of text, one for each row of equal blocks: `3-7   kv_1      ffn_768`."""
    rows = [(block.parent_blocks, block.attention.name, block.ffn.name) for block in architecture.blocks]
    lines = [f"{'parent blocks':<14} {'attention':<10} ffn"]
    for (attention, ffn), run in groupby(rows, key=lambda row: row[1:]):
        covered = [index for parent_blocks, _, _ in run for index in parent_blocks]
        indices = str(covered[0]) if len(covered) == 1 else f"{covered[0]}-{covered[-1]}"
        lines.append(f"{indices:<14} {attention:<10} {ffn}")
    return lines


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
"""Texts that a YAML reader of some version takes for another value."""


def _scalar(text: str) -> str:
    """Write a text as a scalar of YAML: as it is where YAML reads it as this text, else in quotes."""
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*( [A-Za-z0-9._/-]+)*", text) and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text)


def _plain(text: str) -> str:
    """Write a text in a line of Markdown, without a meaning there."""
    return re.sub(r"([\\`*<>\[\]|$#&])|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def model_card(
    chosen: ChosenArchitecture,
    parent: ParentInfo,
    hashes: Mapping[str, str],
    refusals: Mapping[Runtime, Iterable[str]],
    training: str,
) -> str:
    """Write a model card in Markdown with front matter: sizes, blocks, runtimes that load the child, provenance.

    Args:
        chosen: the child's architecture.
        parent: the parent's description.
        hashes: provenance, name -> sha256.
        refusals: runtime -> reasons why it cannot load the checkpoint.
        training: a sentence on the making of the weights.
    """
    predicted = chosen.predicted
    return "\n".join(
        [
            *_front_matter(parent),
            f"# {_plain(parent.name)}, {_plain(chosen.label)}",
            "",
            f"A child of {_plain(parent.name)} ({_plain(parent.source)}), made with Puzzle (arXiv 2411.19146):",
            f"{predicted.params:,} parameters, {predicted.params_ratio:.1%} of the parent's; of its blocks' "
            f"parameters {predicted.block_params_ratio:.1%}, of its KV cache {predicted.kv_ratio:.1%}.",
            training,
            "",
            "## Architecture",
            "",
            "```",
            *architecture_table(chosen.architecture),
            "```",
            "",
            *_loading(refusals),
            "",
            *_provenance(parent, hashes),
            "",
        ]
    )


def _front_matter(parent: ParentInfo) -> list[str]:
    return [
        "---",
        f"license: {_scalar(parent.licence)}",
        f"base_model: {_scalar(parent.name)}",
        "library_name: transformers",
        "tags: [puzzle, nemotron-nas, pruning, distillation]",
        "---",
    ]


def _loading(refusals: Mapping[Runtime, Iterable[str]]) -> list[str]:
    """Return instructions for loading the child, and the runtimes that do."""
    loads = {"llama.cpp": "loads it once it is exported to GGUF"}
    runtimes = [
        f"- {name}: {'no: ' + '; '.join(reasons) if reasons else loads.get(name, 'loads it')}"
        for name, reasons in refusals.items()
    ]
    return [
        "## Load it",
        "",
        "```python",
        "import tasks.puzzle.model.child  # registers the class; no remote code",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        "Stock runtimes (llama.cpp was run, the loaders of the others were read):",
        "",
        *runtimes,
    ]


def _provenance(parent: ParentInfo, hashes: Mapping[str, str]) -> list[str]:
    licence_files = ", ".join(parent.licence_files) or "none came with the parent"
    return [
        "## Provenance",
        "",
        *(f"- {name}: `{digest}`" for name, digest in hashes.items()),
        "",
        f"Licence of the parent: {_plain(parent.licence)} (files: {_plain(licence_files)}).",
    ]
