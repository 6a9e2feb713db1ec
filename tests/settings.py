"""Params for tiny parents: short sequences, float32, one thread, seconds instead of minutes."""

from typing import Any

from storage.params import Params, parse

SEQ_LEN = 16


def tiny_values(**overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the raw mapping behind :func:`tiny_params`, as a params.yaml of this size would hold it."""
    constraint = {"metric": "block_params", "at_most_ratio": 0.7}
    values: dict[str, Any] = {section: {} for section in Params.model_fields} | {
        "run": {"dtype": "float32", "device": "cpu", "threads": 1, "workers": 1},
        "prepare_corpus": {
            "seq_len": SEQ_LEN,
            "train_tokens": 48 * SEQ_LEN,
            "calibration_tokens": 16 * SEQ_LEN,
            "validation_tokens": 8 * SEQ_LEN,
        },
        "cache_activations": {"dtype": "float32", "sequences_per_shard": 12, "sequences_per_batch": 5},
        "distill_blocks": {
            "fit_tokens": 24 * SEQ_LEN,
            "tokens": 32 * SEQ_LEN,
            "variant_tokens": {},
            "sequences_per_step": 4,
            "learning_rate": 1e-3,
            "held_out_tokens": 5 * SEQ_LEN,
            "importance_tokens": 8 * SEQ_LEN,
            "ffn_ratios": [0.5, 0.25],
            "width_multiple": 8,
        },
        "score_blocks": {
            "tokens": 4 * SEQ_LEN,
            "initial_tokens": 2 * SEQ_LEN,
            "blocks_per_group": 2,
            "sequences_per_batch": 2,
        },
        "refine_child": {"tokens": 24 * SEQ_LEN, "held_out_tokens": 4 * SEQ_LEN},
        "distill_child": {
            "tokens": 16 * SEQ_LEN,
            "sequences_per_step": 2,
            "learning_rate": 1e-3,
            "held_out_tokens": 4 * SEQ_LEN,
            "checkpoint_steps": 3,
        },
        "evaluate_child": {
            "tokens": 8 * SEQ_LEN,
            "baseline_tokens": 4 * SEQ_LEN,
            "domain_baseline_tokens": 4 * SEQ_LEN,
            "export_tokens": 4 * SEQ_LEN,
            "sequences_per_batch": 4,
        },
        "report": {"png_dpi": 50},
        "targets": {"small": {"label": "Small", "constraints": {"size": constraint}}},
    }
    for section, changed in overrides.items():
        values[section] = {**values[section], **changed}
    return values


def tiny_params(**overrides: dict[str, Any]) -> Params:
    """Make params for a parent of tests.tiny; `overrides` change single keys of a section: `run={"seed": 1}`."""
    return parse(tiny_values(**overrides), "tests/settings.py")
