"""The table of docs/parents.md, from the code that takes and refuses parents: `python -m tests.studies.parents`."""

from pathlib import Path

from storage.model_config import FAMILIES, REFUSED_FAMILIES, Family

DOCUMENT = Path(__file__).parents[2] / "docs/parents.md"
_BEGIN, _END = "<!-- families -->\n", "<!-- /families -->\n"


def table() -> str:
    """Return the families that are taken, with what each may have, and the well-known ones that are refused."""
    lines = ["| architecture | taken | what it may have, or why not |", "|---|---|---|"]
    lines += [f"| `{name}` | yes | {_features(family)} |" for name, family in FAMILIES.items()]
    lines += [f"| `{name}` | no | {reason} |" for name, reason in REFUSED_FAMILIES.items()]
    return "\n".join([*lines, ""])


def _features(family: Family) -> str:
    """Say what a family has besides what all have."""
    projections = {"q, k and v": family.qkv_bias, "output": family.output_bias, "FFN": family.mlp_bias}
    always = [name for name, bias in projections.items() if bias is True]
    if_said = [f"{name} (`{bias}`)" for name, bias in projections.items() if isinstance(bias, str)]
    features = [f"biases of {', '.join(always)}"] if always else []
    features += [f"biases where config.json says so: {', '.join(if_said)}"] if if_said else []
    features += ["an RMSNorm over each head of queries and keys (qk-norm)"] if family.qk_norm else []
    if family.default_window is not None:
        switch = f", where `{family.window_switch}` is on" if family.window_switch else ""
        features.append(f"a sliding window{switch}: contexts up to it")
    return "; ".join(features)


def written(text: str) -> str:
    """Return the document with the table of today."""
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    return f"{head}{begin}\n{table()}\n{end}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
