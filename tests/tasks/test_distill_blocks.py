"""distill_blocks: the library holds the result of a plain run of BLD, and only missing pieces are planned."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from storage.activations import BoundaryReader
from storage.checkpoints import CheckpointWriter
from storage.files import DamagedFileError, InputError
from storage.library import INDEX_SCHEMA, Library, channel_order_name, entry_name, whole_name
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention
from tasks.cache_activations import plan_shards
from tasks.distill_blocks import plan_blocks, train_block, trained_variants
from tasks.puzzle.distill.losses import normalised_mse
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import cache, checksums, distill, planned_variants, prepare
from tests.tiny import FAMILIES, flip_byte

CPU = torch.device("cpu")
VARIANTS = ("kv_1", "ffn_48", "ffn_24")
ALL_ENTRIES = [f"block_{index:03d}.{variant}" for index in range(3) for variant in VARIANTS]


def index_rows(paths: Paths) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Library(paths.library).index_path).to_pylist()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_holds_every_variant_with_its_held_out_loss(family: str, tmp_path: Path) -> None:
    params, paths = prepare(family, tmp_path)
    cache(params, paths)
    assert distill(params, paths) == ALL_ENTRIES
    rows, library, parent = index_rows(paths), Library(paths.library), Parent(paths.parent)
    assert [f"block_{row['first_block']:03d}.{row['variant']}" for row in rows] == sorted(ALL_ENTRIES)
    assert sum(row["loss_after"] < row["loss_before"] for row in rows) > len(rows) / 2
    held_out = range(16 - 5, 16)
    for row in rows:
        variant = next(candidate for candidate in trained_variants(params, parent) if candidate.name == row["variant"])
        block = parent.block(row["first_block"], CPU, torch.float32)
        tensors = library.read(entry_name(row["first_block"], variant))
        attention, ffn = parent_attention(parent.config), parent_ffn(parent.config)
        attention, ffn = (variant, ffn) if isinstance(variant, Attention) else (attention, variant)
        rest = {name: block[name] for name in block if name.startswith(_OTHER_HALF[row["subblock"]])}
        student = Block.load(parent.config, attention, ffn, {**tensors, **rest})
        source, target = (
            BoundaryReader(paths.activations, "calibration", row["first_block"] + offset).read(held_out)
            for offset in (0, 1)
        )
        output = student(source, rotary_for(parent.config, SEQ_LEN, source))
        losses = [  # the mean over batches of 4 and 1 sequences, as they are trained
            float((output[part] - target[part]).square().mean() / target[part].square().mean())
            for part in (slice(4), slice(4, 5))
        ]
        kept = row["loss_after"] if row["weights"] == "decoupled" else row["loss_before"]
        assert sum(losses) / 2 == pytest.approx(kept, rel=1e-4)


_OTHER_HALF = {
    "attention": ("post_attention_layernorm.", "mlp."),
    "ffn": ("input_layernorm.", "self_attn."),
}


def test_the_index_names_files_and_budget(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    table = pq.read_table(Library(paths.library).index_path)
    assert table.schema.equals(INDEX_SCHEMA)
    bytes_of = checksums(paths.library)
    for row in table.to_pylist():
        assert row["span"] == 1
        assert row["tokens"] == 32 * SEQ_LEN
        assert bytes_of[row["file"]] == row["sha256"]


def test_narrow_widths_start_from_the_channels_that_the_parent_uses_most(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    order = Library(paths.library).read(channel_order_name(0))["order"]
    assert sorted(order.tolist()) == list(range(96))
    assert (paths.library / "block_000" / "channel_order.safetensors").is_file()


def test_two_runs_give_the_same_bytes(finished: tuple[Params, Paths], tmp_path: Path) -> None:
    _, paths = finished
    params, others = prepare("llama", tmp_path / "again")
    cache(params, others)
    for plan in reversed(plan_blocks.fn(params, others)):
        train_block.fn(plan, params, others)
    distill(params, others)
    assert checksums(paths.library) == checksums(others.library)


def test_only_what_a_killed_run_left_undone_is_trained(finished: tuple[Params, Paths], tmp_path: Path) -> None:
    _, whole = finished
    params, paths = prepare("llama", tmp_path / "killed")
    cache(params, paths)
    train_block.fn(plan_blocks.fn(params, paths)[1], params, paths)
    half_written = Library(paths.library).path("block_002.kv_1")
    half_written.parent.mkdir()
    half_written.write_bytes(b"killed here, before its record")
    assert planned_variants(params, paths) == ALL_ENTRIES[:3] + ALL_ENTRIES[6:]
    assert not half_written.exists()
    assert distill(params, paths) == ALL_ENTRIES[:3] + ALL_ENTRIES[6:]
    assert checksums(paths.library) == checksums(whole.library)
    assert distill(params, paths) == []


def test_a_variant_trained_alone_later_has_the_bytes_of_one_trained_with_all(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    whole = checksums(paths.library)
    Library(paths.library).path("block_001.ffn_48").unlink()
    assert distill(params, paths) == ["block_001.ffn_48"]
    assert checksums(paths.library) == whole


def test_another_learning_rate_retrains_all_but_caches_nothing(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"learning_rate": 3e-3})
    assert plan_shards.fn(params, paths) == []
    assert planned_variants(params, paths) == ALL_ENTRIES
    left = {Path(name).name for name in checksums(paths.library)}
    assert left == {"channel_order.safetensors", *(f"block_{i:03d}.channel_order.json" for i in range(3))}


@pytest.mark.parametrize(
    ("override", "retrained"),
    [
        ({"learning_rates": {"gqa": 3e-3}}, {"kv_1"}),
        ({"learning_rates": {"linear": 3e-3, "whole": 3e-3}}, set()),
        ({"variant_tokens": {"ffn_48": 16 * SEQ_LEN}}, {"ffn_48"}),
        ({"variant_tokens": {"ffn_24": 40 * SEQ_LEN}}, {"ffn_24"}),
        ({"loss": "token_mse"}, set(VARIANTS)),
        ({"check_steps": 2}, set(VARIANTS)),
    ],
)
def test_a_recipe_retrains_what_it_is_for(
    override: dict[str, Any], retrained: set[str], finished: tuple[Params, Paths]
) -> None:
    """Every other byte stays as it was, although the longest variant decides how many batches are read."""
    _, paths = finished
    before = checksums(paths.library)
    params = tiny_params(distill_blocks=override, distill_child={"tokens": 8 * SEQ_LEN})
    assert set(distill(params, paths)) == {name for name in ALL_ENTRIES if name.partition(".")[2] in retrained}
    after = checksums(paths.library)
    same = {name for name in before if before[name] == after[name]}
    assert len(before) - len(same) >= 3 * len(retrained)
    of_others = {
        f"block_{i:03d}/{name}.safetensors" for i in range(3) for name in {*VARIANTS, "channel_order"} - retrained
    }
    assert of_others <= same
    tokens = {row["variant"]: row["tokens"] for row in index_rows(paths)}
    for variant in VARIANTS:
        assert tokens[variant] == override.get("variant_tokens", {}).get(variant, 32 * SEQ_LEN)


@pytest.mark.parametrize("num_sequences", [16, 40])
def test_other_variants_tokens_leave_a_variants_own_bytes(num_sequences: int, finished: tuple[Params, Paths]) -> None:
    """A variant reads its own number of tokens, whatever the others read; another `tokens` retrains all."""
    _, paths = finished

    def params_with(**changed: Any) -> Params:
        tokens = {"ffn_48": num_sequences * SEQ_LEN, **changed.pop("variant_tokens", {})}
        return tiny_params(
            distill_blocks={"variant_tokens": tokens, **changed},
            prepare_corpus={"train_tokens": 48 * SEQ_LEN},
            distill_child={"tokens": 4 * SEQ_LEN, "sequences_per_step": 2},
        )

    distill(params_with(), paths)
    before = Library(paths.library).checksum("block_001.ffn_48")
    trained = distill(params_with(variant_tokens={"kv_1": 44 * SEQ_LEN}), paths)
    assert {name.partition(".")[2] for name in trained} == {"kv_1"}
    trained = distill(params_with(tokens=28 * SEQ_LEN), paths)
    assert "block_001.ffn_48" in trained
    assert Library(paths.library).checksum("block_001.ffn_48") != before


def test_more_tokens_that_rank_more_channels_make_the_order_anew(finished: tuple[Params, Paths]) -> None:
    """`importance_tokens` are at most all that BLD reads: 28 sequences here, then 32, of the same three shards."""
    _, paths = finished
    few, more = (
        tiny_params(distill_blocks={"importance_tokens": 40 * SEQ_LEN, "tokens": count * SEQ_LEN}) for count in (28, 32)
    )
    distill(few, paths)
    orders = {name for plan in plan_blocks.fn(more, paths) for name in plan.missing if name.endswith("channel_order")}
    assert orders == {channel_order_name(index) for index in range(3)}


def test_a_variant_that_stopped_early_has_fewer_tokens_in_the_index(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"check_steps": 1, "patience": 1, "learning_rates": {"gqa": 1.0}})
    distill(params, paths)
    rows = [row for row in index_rows(paths) if row["variant"] == "kv_1"]
    assert {row["tokens"] for row in rows} == {4 * SEQ_LEN}
    assert all(row["loss_after"] == row["loss_fitted"] for row in rows if row["weights"] == "decoupled")


def test_tokens_of_a_variant_that_is_none_are_refused(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"variant_tokens": {"kv_3": 16 * SEQ_LEN}})
    with pytest.raises(InputError, match="variant_tokens names 'kv_3', the library has kv_1, ffn_48, ffn_24, whole"):
        plan_blocks.fn(params, paths)


@pytest.mark.parametrize(
    "overrides",
    [{"run": {"seed": 1}}, {"run": {"threads": 2}}, {"distill_blocks": {"tokens": 28 * SEQ_LEN}}],
)
def test_what_changes_bytes_retrains_all(overrides: dict[str, dict[str, Any]], finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    assert planned_variants(tiny_params(**overrides), paths) == ALL_ENTRIES


def test_another_block_of_the_parent_retrains_that_block_and_those_that_it_feeds(
    finished: tuple[Params, Paths],
) -> None:
    params, paths = finished
    checkpoint = Parent(paths.parent).checkpoint
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.files}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    writer = CheckpointWriter(paths.parent, 1 << 30)
    writer.add(tensors)
    writer.finish()
    assert planned_variants(params, paths) == ALL_ENTRIES[3:]


def test_one_more_width_trains_only_that(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    before = checksums(paths.library)
    params = tiny_params(distill_blocks={"ffn_ratios": [0.5, 0.75, 0.25]})
    assert distill(params, paths) == [f"block_{index:03d}.ffn_72" for index in range(3)]
    after = checksums(paths.library)
    assert all(after[name] == before[name] for name in before if name != "index.parquet")
    assert len(index_rows(paths)) == 12


def test_linear_layers_train_only_themselves_and_are_an_own_variant_of_both_halves(
    finished: tuple[Params, Paths],
) -> None:
    _, paths = finished
    before = checksums(paths.library)
    names = [f"block_{index:03d}.{half}_linear" for index in range(3) for half in ("attention", "ffn")]
    assert sorted(distill(tiny_params(distill_blocks={"linear": True}), paths)) == names
    after = checksums(paths.library)
    assert all(after[name] == before[name] for name in before if name != "index.parquet")
    rows = [row for row in index_rows(paths) if row["variant"] == "linear"]
    assert {(row["first_block"], row["subblock"]) for row in rows} == {
        (i, s) for i in range(3) for s in ("attention", "ffn")
    }
    assert all(row["loss_after"] <= min(row["loss_before"], row["loss_fitted"]) for row in rows)


def test_spans_train_only_themselves_towards_the_boundary_behind_their_last_block(
    finished: tuple[Params, Paths],
) -> None:
    _, paths = finished
    before = checksums(paths.library)
    params = tiny_params(distill_blocks={"spans": [2]})
    names = [f"span_{index:03d}_2.{name}" for index in range(2) for name in ("whole", *VARIANTS)]
    assert distill(params, paths) == names
    after, library, parent = checksums(paths.library), Library(paths.library), Parent(paths.parent)
    assert all(after[name] == before[name] for name in before if name != "index.parquet")
    rows = [row for row in index_rows(paths) if row["span"] == 2]
    assert {(row["first_block"], row["variant"]) for row in rows} == {
        (i, v) for i in (0, 1) for v in ("whole", *VARIANTS)
    }
    kind = parent_attention(parent.config), parent_ffn(parent.config)
    for row in rows:
        if row["variant"] == "whole":
            first = row["first_block"]
            source, target = (
                BoundaryReader(paths.activations, "calibration", boundary).read(range(11, 16))
                for boundary in (first, first + 2)
            )
            rotary = rotary_for(parent.config, SEQ_LEN, source)
            losses = []
            for tensors in (
                parent.block(library.start_of(first, 2), CPU, torch.float32),
                library.read(whole_name(first, 2)),
            ):
                output = Block.load(parent.config, *kind, tensors)(source, rotary)
                parts = (slice(4), slice(4, 5))
                losses.append(sum(float(normalised_mse(output[part], target[part])) for part in parts) / 2)
            assert losses == pytest.approx([row["loss_before"], row["loss_after"]], rel=1e-4)
    assert distill(params, paths) == []
    Library(paths.library).path("span_001_2.whole").unlink()
    assert distill(params, paths) == ["span_001_2.whole"]
    assert checksums(paths.library) == after


def test_a_span_longer_than_the_parent_is_refused(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    with pytest.raises(InputError, match=r"distill_blocks\.spans has 4, .* has 3 blocks"):
        plan_blocks.fn(tiny_params(distill_blocks={"spans": [2, 4]}), paths)


def test_one_width_less_removes_only_that(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    before = checksums(paths.library)
    assert distill(tiny_params(distill_blocks={"ffn_ratios": [0.5]}), paths) == []
    after = checksums(paths.library)
    gone = {name for name in before if name not in after}
    assert gone == {name for name in before if "ffn_24" in name}
    assert [row["variant"] for row in index_rows(paths)] == ["ffn_48", "kv_1"] * 3


@pytest.mark.parametrize("name", ["block_001/ffn_48.safetensors", ".pieces/block_001.ffn_48.json"])
def test_a_flipped_byte_in_an_entry_retrains_only_that(name: str, finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    whole = checksums(paths.library)
    flip_byte(paths.library / name, -40)
    with pytest.raises(DamagedFileError, match=r"block_001.ffn_48.*dvc repro distill_blocks"):
        Library(paths.library).read("block_001.ffn_48")
    assert distill(params, paths) == ["block_001.ffn_48"]
    assert checksums(paths.library) == whole


def test_a_damaged_channel_order_is_ranked_anew_without_training(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    whole = checksums(paths.library)
    flip_byte(paths.library / "block_002" / "channel_order.safetensors")
    [plan] = plan_blocks.fn(params, paths)
    assert (plan.first_block, plan.span, list(plan.missing)) == (2, 1, [plan.order_name])
    assert distill(params, paths) == []
    assert checksums(paths.library) == whole


def test_damaged_activations_stop_the_training_and_spare_finished_blocks(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    params = tiny_params(distill_blocks={"learning_rate": 3e-3})
    flip_byte(paths.activations / "train" / "boundary_002" / "shard_001.arrow", 5000)
    first, second, _ = plan_blocks.fn(params, paths)
    train_block.fn(first, params, paths)
    with pytest.raises(DamagedFileError, match=r"boundary_002/shard_001.arrow.*dvc repro cache_activations"):
        train_block.fn(second, params, paths)
    assert planned_variants(params, paths) == ALL_ENTRIES[3:]


def test_a_rate_at_which_all_diverge_keeps_every_start(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    distill(tiny_params(distill_blocks={"learning_rate": 1.0, "warmup": 0.0, "fit_tokens": 0}), paths)
    rows = index_rows(paths)
    assert {row["weights"] for row in rows} == {"initial"}
    assert not any(row["loss_after"] < row["loss_before"] for row in rows)


def test_a_closed_form_start_is_kept_where_steps_diverge(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    distill(tiny_params(distill_blocks={"learning_rate": 1.0, "warmup": 0.0}), paths)
    rows = index_rows(paths)
    kept = [row for row in rows if row["weights"] == "decoupled"]
    assert len(kept) > len(rows) / 2
    assert all(row["loss_after"] == row["loss_fitted"] < row["loss_before"] for row in kept)


def test_without_tokens_the_closed_form_start_is_all(finished: tuple[Params, Paths]) -> None:
    """The start is that of a run with steps, and no step is taken from it."""
    _, paths = finished
    stepped = {row["file"]: row for row in pq.read_table(Library(paths.library).index_path).to_pylist()}
    params = tiny_params(distill_blocks={"tokens": 0})
    assert distill(params, paths) == ALL_ENTRIES
    rows = pq.read_table(Library(paths.library).index_path).to_pylist()
    assert len(rows) == len(stepped)
    for row in rows:
        assert row["tokens"] == 0
        assert row["loss_fitted"] == stepped[row["file"]]["loss_fitted"]
        assert row["loss_after"] == min(row["loss_before"], row["loss_fitted"])
