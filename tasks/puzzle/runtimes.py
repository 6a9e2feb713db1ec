"""Which runtime computes which architecture right, and why not (RUNTIMES.md). No torch.

One table of rules; what a runtime would compute wrong is refused for it with the reason and the way out.
"""

from collections.abc import Mapping
from typing import Any

_NEEDS_FFN_MULT = ("sglang", "tensorrt-llm")  # read the width from ffn_mult only; vLLM also takes intermediate_size
_LINEAR_ATTENTION = ("tensorrt-llm", "llama.cpp")
_LINEAR_FFN = ("tensorrt-llm",)
RUNTIMES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp")


def refusals(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Runtime -> reasons why it cannot load this nemotron-nas config.json right; an empty list means it can.

    Args:
        config: a config.json in the form of :func:`storage.model_config.to_nemotron_nas`.
    """
    return {runtime: list(_reasons(runtime, config)) for runtime in RUNTIMES}


def _reasons(runtime: str, config: Mapping[str, Any]) -> list[str]:
    blocks = config["block_configs"]
    reasons = []
    odd = sorted(
        {b["ffn"]["intermediate_size"] for b in blocks if b["ffn"]["intermediate_size"] and not b["ffn"]["ffn_mult"]}
    )
    if runtime in _NEEDS_FFN_MULT and odd:
        reasons.append(f"FFN widths {odd} are no multiples of 256; set distill_blocks.width_multiple to 256")
    if runtime != "llama.cpp" and blocks[0]["attention"]["no_op"]:
        reasons.append("block 0 has no attention")
    if runtime not in _LINEAR_ATTENTION and any(b["attention"]["replace_with_linear"] for b in blocks):
        reasons.append("it has no linear attention")
    if runtime not in _LINEAR_FFN and any(b["ffn"]["replace_with_linear"] for b in blocks):
        reasons.append("it has no linear FFN")
    if runtime == "tensorrt-llm" and (config["qkv_bias"] or config["attention_bias"] or config["mlp_bias"]):
        reasons.append("it takes no biases")
    if runtime == "llama.cpp":
        reasons.append("it reads GGUF, not this folder; an export with stand-ins for removed subblocks is needed")
        if config["hidden_act"] != "silu":
            reasons.append(f"it computes SiLU only, not {config['hidden_act']}")
    return reasons
