"""What each runtime makes of a model, from its config.json alone: no weights, no torch."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from storage.files import read_json
from storage.model_config import NEMOTRON_NAS, ModelConfig, from_config_json
from storage.records import Attention, ExportFormat, Ffn
from tasks.puzzle.runtimes import format_refusals, verdicts

_COLUMNS = 100


def check_runtimes(config_json: Path) -> dict[str, Any]:
    """{model, runtimes, formats}: what each runtime takes and why not, and what the model can be exported as.

    Raises:
        InputError: the config is of no supported kind, with the reason.
    """
    raw = read_json(config_json, "the download")
    config, blocks = from_config_json(raw, str(config_json))
    return {
        "model": {
            "form": raw.get("model_type", NEMOTRON_NAS),
            "num_blocks": config.num_blocks,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
        },
        "runtimes": runtimes_of(config, blocks),
        "formats": formats_of(config, blocks),
    }


def runtimes_of(config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> dict[str, Any]:
    """Runtime -> the forms that it takes, and why not its own form, with the way out."""
    return {
        of.runtime: {
            "takes": list(of.takes),
            "refusals": [{"reason": one.text, "way_out": one.way_out} for one in of.refusals],
        }
        for of in verdicts(config, blocks)
    }


def formats_of(config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> dict[str, list[dict[str, str]]]:
    """Format -> why the model cannot be had in it; nothing where it can."""
    formats: tuple[ExportFormat, ...] = get_args(ExportFormat)
    return {
        name: [{"reason": one.text, "way_out": one.way_out} for one in format_refusals(name, config, blocks)]
        for name in formats
    }


def checked_text(found: Mapping[str, Any]) -> str:
    """What :func:`check_runtimes` found, for people."""
    model = found["model"]
    lines = [
        f"{model['form']}: {model['num_blocks']} blocks, hidden size {model['hidden_size']}, "
        f"{model['num_heads']} heads of {model['head_dim']}",
        "",
        *runtimes_lines(found["runtimes"]),
        "",
        "exports: " + ", ".join(name for name, against in found["formats"].items() if not against),
    ]
    for name, against in found["formats"].items():
        lines += [line for one in against for line in _wrapped(f"  not {name}: ", one)]
    return "\n".join([*lines, ""])


def runtimes_lines(runtimes: Mapping[str, Any]) -> Iterator[str]:
    """A line for each runtime with the forms that it computes right, and under it why not its own."""
    yield f"{'runtime':<14} computes right"
    for name, of in runtimes.items():
        yield f"{name:<14} {', '.join(of['takes']) or 'nothing'}"
        for one in of["refusals"]:
            yield from _wrapped(f"{'':<15}not {'GGUF' if name == 'llama.cpp' else NEMOTRON_NAS}: ", one)


def _wrapped(start: str, against: Mapping[str, str]) -> list[str]:
    """The reason behind `start`, and the way out below it."""
    indent = " " * (len(start) - len(start.lstrip()))
    texts = (f"{start}{against['reason']}", f"{indent}way out: {against['way_out']}")
    return [line for text in texts for line in textwrap.wrap(text, _COLUMNS, subsequent_indent=f"{indent}  ")]
