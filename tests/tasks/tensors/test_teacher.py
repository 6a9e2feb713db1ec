"""Where GKD takes the parent's states from: by the setting, by what the cache keeps, and by the bytes it would take."""

from dataclasses import replace
from typing import Any

import pytest

from tasks.tensors.teacher import cached_train_tokens, teacher_is_live, tokens_before_gkd
from tests.puzzle.test_search_space import SMOLLM2
from tests.settings import SEQ_LEN, tiny_params

ROLLING = {"mode": "rolling"}


@pytest.mark.parametrize(
    ("cache", "gkd", "is_live"),
    [
        ({}, {}, False),
        (ROLLING, {}, True),
        ({**ROLLING, "keep": [1]}, {}, False),
        (ROLLING, {"cosine_weight": 0.0}, False),
        (ROLLING, {"teacher": "cache"}, False),
        ({}, {"teacher": "live"}, True),
        ({}, {"teacher": "streamed", "ranks": 1}, True),
    ],
)
def test_a_rolling_cache_that_keeps_nothing_for_the_cosine_loss_has_a_live_teacher(
    cache: dict[str, Any], gkd: dict[str, Any], is_live: bool
) -> None:
    params = tiny_params(cache_activations=cache, distill_child=gkd)
    assert teacher_is_live(params, SMOLLM2) == is_live
    assert cached_train_tokens(params, SMOLLM2, 48 * SEQ_LEN) == (32 if is_live else 48) * SEQ_LEN
    assert cached_train_tokens(params, SMOLLM2, 10) == 10


@pytest.mark.parametrize(
    ("num_blocks", "dtype", "is_live"), [(3, "float32", False), (4, "float32", True), (4, "bfloat16", False)]
)
def test_more_than_four_gib_of_boundaries_are_computed_instead(num_blocks: int, dtype: str, is_live: bool) -> None:
    """256 tokens x 4 boundaries x 2^20 hidden x 4 bytes are 4 GiB."""
    config = replace(SMOLLM2, num_blocks=num_blocks, hidden_size=2**20)
    params = tiny_params(cache_activations={"dtype": dtype}, distill_child={"tokens": 256})
    assert teacher_is_live(params, config) == is_live


def test_gkd_begins_behind_whichever_used_more_tokens() -> None:
    assert tokens_before_gkd(tiny_params(refine_child={"tokens": 24 * SEQ_LEN})) == 32 * SEQ_LEN
    assert (
        tokens_before_gkd(tiny_params(distill_child={"tokens": 8 * SEQ_LEN}, refine_child={"tokens": 40 * SEQ_LEN}))
        == 40 * SEQ_LEN
    )
