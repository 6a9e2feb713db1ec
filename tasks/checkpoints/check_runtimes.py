"""Each runtime's verdict on a model, from its config.json alone: no weights, no torch.

In: a config.json of any supported kind. Out: the formats that each runtime computes right with the reasons against the
others, and the formats that the model can be exported in, as records, JSON or a table for people.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.block_configs import BLOCK_CONFIGS, PER_LAYER_CONFIG
from storage.formats import FORMATS
from storage.json_files import read_object
from storage.model_config import ModelConfig
from storage.nemotron_nas import NEMOTRON_NAS, from_config_json
from tasks.puzzle.runtimes.rules import FIRST_FORMAT, Refusal, Verdict, format_refusals, verdicts

_COLUMNS = 100
_LISTED = " with "
_AS_IT_IS = "as it is, for ModelOpt or vLLM's AnyModel alone; below, what `puzzle export` makes of it"


@dataclass(frozen=True)
class CheckedModel:
    """A model's geometry and form (`model_type` of its config.json, and its list of blocks that differ), with verdicts.

    `formats` has the refusals of every export format, none where the model can be exported in it.
    """

    form: str
    config: ModelConfig
    verdicts: Sequence[Verdict]
    formats: Mapping[str, Sequence[Refusal]]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object {model, runtimes, formats}."""
        return {
            "model": {
                "form": self.form,
                "num_blocks": self.config.num_blocks,
                "hidden_size": self.config.hidden_size,
                "num_heads": self.config.num_heads,
                "head_dim": self.config.head_dim,
            },
            "runtimes": verdicts_json(self.verdicts),
            "formats": {name: _refusals_json(refusals) for name, refusals in self.formats.items()},
        }


def check_runtimes(config_json: Path) -> CheckedModel:
    """Check what each runtime takes of a model, and what the model can be exported as.

    Raises:
        InputError: the config is of no supported kind, with the reason.
    """
    raw = read_object(config_json, "the download")
    config, blocks = from_config_json(raw, str(config_json))
    formats = {name: format_refusals(name, config, blocks) for name in FORMATS}
    return CheckedModel(_form(raw), config, verdicts(config, blocks), formats)


def _form(raw: Mapping[str, Any]) -> str:
    """Name the form of a config.json that could be read."""
    kind = raw.get("model_type", NEMOTRON_NAS)
    lists = [key for key in (BLOCK_CONFIGS, PER_LAYER_CONFIG) if kind != NEMOTRON_NAS and raw.get(key)]
    return f"{kind}{_LISTED}{' and '.join(lists)}" if lists else kind


def verdicts_json(judged: Sequence[Verdict]) -> dict[str, Any]:
    """Map each runtime to formats it takes, and why not its first one, with the way out; as exports.json has them."""
    return {
        verdict.runtime: {"takes": list(verdict.takes), "refusals": _refusals_json(verdict.refusals)}
        for verdict in judged
    }


def _refusals_json(refusals: Sequence[Refusal]) -> list[dict[str, str]]:
    return [{"reason": refusal.text, "way_out": refusal.way_out} for refusal in refusals]


def checked_text(checked: CheckedModel) -> str:
    """Format the result of :func:`check_runtimes` for people."""
    config, exportable = checked.config, [name for name, refusals in checked.formats.items() if not refusals]
    lines = [
        f"{checked.form}: {config.num_blocks} blocks, hidden size {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_dim}",
        *([_AS_IT_IS] if _LISTED in checked.form else []),
        "",
        *verdict_lines(checked.verdicts),
        "",
        "exports: " + ", ".join(exportable),
    ]
    for name, refusals in checked.formats.items():
        for refusal in refusals:
            lines += _wrapped(f"  not {name}: ", refusal)
    return "\n".join([*lines, ""])


def verdict_lines(judged: Sequence[Verdict]) -> Iterator[str]:
    """Yield a line for each runtime with the formats that it computes right; below it why not its first one."""
    yield f"{'runtime':<14} computes right"
    for verdict in judged:
        yield f"{verdict.runtime:<14} {', '.join(verdict.takes) or 'nothing'}"
        for refusal in verdict.refusals:
            yield from _wrapped(f"{'':<15}not {FIRST_FORMAT[verdict.runtime]}: ", refusal)


def _wrapped(start: str, refusal: Refusal) -> Iterator[str]:
    """Yield the reason behind `start`, and the way out below it."""
    indent = " " * (len(start) - len(start.lstrip()))
    texts = (f"{start}{refusal.text}", f"{indent}way out: {refusal.way_out}")
    for text in texts:
        yield from textwrap.wrap(text, _COLUMNS, subsequent_indent=f"{indent}  ")
