"""Operating points: what constraints leave open, as the cost table has it."""

import pytest

from storage.files import InputError
from storage.records import CostRow
from storage.scenario import Place, Setting
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.search import operating_points as module
from tasks.puzzle.search.operating_points import OpenSetting, operating_points

CHAT, RAG = (Place("gpu", "engine", "fp8", scenario) for scenario in ("128/128", "2048/128"))


def row(place: Place, batch: int, degree: int) -> CostRow:
    """Make an empty row of a setting."""
    return CostRow(
        component="step",
        variant="parent",
        first_block=None,
        span=1,
        hardware=place.hardware,
        engine=place.engine,
        precision=place.precision,
        tensor_parallel=degree,
        scenario=place.scenario,
        batch=batch,
        prefill_ms=0.0,
        decode_ms=0.0,
        weight_bytes=0,
        kv_bytes_per_token=0,
        params=0,
        origin="modelled",
        how="",
    )


TABLE = CostTable(row(place, batch, degree) for place in (CHAT, RAG) for batch in (1, 8, 64) for degree in (1, 2))


def test_one_deployment_has_one_degree_and_a_batch_for_each_scenario() -> None:
    points = operating_points([OpenSetting(CHAT, None, None), OpenSetting(RAG, None, None)], TABLE)
    assert len(points) == 2 * 3 * 3
    for point in points:
        assert point.setting(CHAT).tensor_parallel == point.setting(RAG).tensor_parallel
    assert len({point.text for point in points}) == len(points)


def test_what_a_constraint_names_is_kept_by_all_on_that_place() -> None:
    points = operating_points([OpenSetting(CHAT, None, 2), OpenSetting(CHAT, 8, None)], TABLE)
    assert [point.settings for point in points] == [(Setting("gpu", "engine", "fp8", 2, "128/128", 8),)]
    assert points[0].setting(CHAT) == points[0].settings[0]


def test_small_batches_come_first() -> None:
    points = operating_points([OpenSetting(CHAT, None, 1)], TABLE)
    assert [point.setting(CHAT).batch for point in points] == [1, 8, 64]


@pytest.mark.parametrize(
    "open_setting", [OpenSetting(CHAT, 16, None), OpenSetting(Place("cpu", "engine", "fp8", "128/128"), None, None)]
)
def test_what_the_table_lacks_is_said_with_what_it_has(open_setting: OpenSetting) -> None:
    with pytest.raises(InputError, match=r"no costs for .*; the table has gpu, engine, fp8, 128/128, batch 1;"):
        operating_points([open_setting], TABLE)


def test_too_many_combinations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_POINTS", 35)
    with pytest.raises(InputError, match=r"more than 35 combinations .*6 at 128/128, 6 at 2048/128"):
        operating_points([OpenSetting(CHAT, None, None), OpenSetting(RAG, None, None)], TABLE)
