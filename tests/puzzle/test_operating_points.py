"""Operating points: what constraints leave open, as the cost table has it."""

import pytest

from storage.files import InputError
from storage.records import CostRow
from tasks.puzzle import operating_points as module
from tasks.puzzle.costs import CostTable
from tasks.puzzle.operating_points import Operation, Place, Wish, operating_points

CHAT, RAG = (Place("gpu", "engine", "fp8", scenario) for scenario in ("128/128", "2048/128"))


def row(place: Place, batch: int, degree: int) -> CostRow:
    """An empty row of a setting."""
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
    points = operating_points([Wish(CHAT, None, None), Wish(RAG, None, None)], TABLE)
    assert len(points) == 2 * 3 * 3
    for point in points:
        assert point.operations[CHAT].tensor_parallel == point.operations[RAG].tensor_parallel
    assert len({point.text for point in points}) == len(points)


def test_what_a_constraint_names_is_kept_by_all_on_that_place() -> None:
    points = operating_points([Wish(CHAT, None, 2), Wish(CHAT, 8, None)], TABLE)
    assert [point.operations for point in points] == [{CHAT: Operation(8, 2)}]
    (setting,) = (point.setting(CHAT) for point in points)
    assert (setting.batch, setting.tensor_parallel, setting.scenario) == (8, 2, "128/128")


def test_small_batches_come_first() -> None:
    points = operating_points([Wish(CHAT, None, 1)], TABLE)
    assert [point.operations[CHAT].batch for point in points] == [1, 8, 64]


@pytest.mark.parametrize("wish", [Wish(CHAT, 16, None), Wish(Place("cpu", "engine", "fp8", "128/128"), None, None)])
def test_what_the_table_lacks_is_said_with_what_it_has(wish: Wish) -> None:
    with pytest.raises(InputError, match=r"no costs for .*; the table has gpu, engine, fp8, 128/128, batch 1;"):
        operating_points([wish], TABLE)


def test_too_many_combinations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_POINTS", 35)
    with pytest.raises(InputError, match=r"more than 35 combinations .*6 at 128/128, 6 at 2048/128"):
        operating_points([Wish(CHAT, None, None), Wish(RAG, None, None)], TABLE)
