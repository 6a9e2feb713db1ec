"""The formats in which a checkpoint can be exported, a row each (docs/runtimes.md).

To add a format of a kind that exists, add its row here. A new kind of format also needs its writer in
tasks/checkpoints/exports.py, and its refusals and runtimes in tasks/puzzle/runtimes/rules.py. Every other module
(params.yaml, the form, commands, plan, the search's constraints, the model card) reads this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema

from storage.files import did_you_mean
from storage.records import Runtime

FormatKind = Literal["nemotron-nas", "padded-llama", "padded-qwen3", "plain", "anymodel", "gguf"]
"""How a format is written and which models it cannot express; several formats may be of one kind."""

FileType = Literal["F32", "F16", "BF16", "Q8_0"]
"""Type of the matrices in a GGUF file, by GGUF's own name."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format.

    Attributes:
        name: the name in params.yaml; also the name of the folder that its files are in.
        kind: the kind of writer that it needs.
        load_text: instructions for loading it, Markdown for the model card's section "Load it".
        size_ratio: bytes of its weights as a multiple of the bytes that 16-bit weights take.
        file_type: type of the matrices, for a GGUF file; None for a folder of safetensors.
        runtime: the runtime that reads nothing else: a child that is exported in this format must run in it.
        allows_linear: whether the format has linear layers in place of attentions or FFNs.
    """

    name: str
    kind: FormatKind
    load_text: str
    size_ratio: float = 1.0
    file_type: FileType | None = None
    runtime: Runtime | None = None
    allows_linear: bool = True

    @property
    def is_gguf(self) -> bool:
        """Tell whether the format is one GGUF file, which holds the tokenizer as well."""
        return self.file_type is not None

    def gguf_name(self, model: str) -> str:
        """Return the name of a model's GGUF file in the format's folder."""
        assert self.file_type is not None, self.name
        return f"{model}-{self.file_type}.gguf"


def _gguf(file_type: FileType, size_ratio: float) -> ExportFormat:
    """Return the format of a GGUF file whose matrices have this type."""
    return ExportFormat(
        name=f"gguf-{file_type.lower()}",
        kind="gguf",
        load_text="One file with tokenizer and chat template for llama.cpp: `llama-server -m FILE`.",
        size_ratio=size_ratio,
        file_type=file_type,
        runtime="llama.cpp",
    )


_ROWS = (
    ExportFormat(
        name="nemotron-nas",
        kind="nemotron-nas",
        load_text="With the class in this folder "
        """(`import tasks.puzzle.model.child` of Puzzle Pipeline does without it):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```

`AutoTokenizer` and mlx-lm want the same flag where the rotary positions are scaled (Llama 3, yarn).

exports.json beside this folder says which other runtimes compute it right.""",
    ),
    ExportFormat(
        name="padded-llama",
        kind="padded-llama",
        load_text="The child as a plain Llama, with zeros where it has nothing: any tool that loads a Llama, with its "
        "`hidden_act`, computes the same, no faster than the parent.",
        allows_linear=False,
    ),
    ExportFormat(
        name="padded-qwen3",
        kind="padded-qwen3",
        load_text="The child as a plain Qwen3, with zeros where it has nothing: any tool that loads a Qwen3 computes "
        "the same, no faster than the parent.",
        allows_linear=False,
    ),
    ExportFormat(
        name="plain",
        kind="plain",
        load_text="A plain model of the parent's family, since all blocks are alike, for any tool that knows the "
        "family.",
    ),
    ExportFormat(
        name="anymodel",
        kind="anymodel",
        load_text="For NVIDIA's ModelOpt (`modelopt.torch.puzzletron`), and a vLLM that has its AnyModel. Nothing else "
        "reads it: transformers alone would give random weights to subblocks that the child lacks.",
        allows_linear=False,
    ),
    _gguf("F32", 2.0),
    _gguf("F16", 1.0),
    _gguf("BF16", 1.0),
    _gguf("Q8_0", 17 / 32),  # 34 bytes hold 32 values
)
FORMATS: Mapping[str, ExportFormat] = {row.name: row for row in _ROWS}
"""Every format by its name."""

LLAMACPP_FORMAT = "gguf-f16"
"""The format in which llama.cpp's speed is measured; also the default of `puzzle chat` and `puzzle serve-child`."""


def _checked(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"unknown format{did_you_mean(name, FORMATS)} (formats: {', '.join(FORMATS)})")
    return name


FormatName = Annotated[str, AfterValidator(_checked), WithJsonSchema({"type": "string", "enum": list(FORMATS)})]
"""The name of a format, as a field of params.yaml or of a form."""
