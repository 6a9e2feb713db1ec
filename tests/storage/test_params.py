"""params.yaml: what is accepted, and that every mistake is named with its place and what was expected."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.files import InputError
from storage.params import Params, load, parse, parse_section
from storage.sections import BenchmarkThroughput
from tests.settings import SEQ_LEN, tiny_params, tiny_values


def problems(values: dict[str, Any]) -> list[str]:
    """Return the lines of the one error that these params give."""
    with pytest.raises(InputError) as caught:
        parse(values, "params.yaml")
    where, _, text = str(caught.value).partition(": ")
    assert where == "params.yaml"
    return text.split("\n  ")


def with_constraint(**fields: Any) -> dict[str, Any]:
    """Return params whose only constraint, named `limit`, has these fields."""
    return tiny_values(targets={"small": {"label": "Small", "constraints": {"limit": fields}}})


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tiny_values(run={"seed": 7})))
    assert load(path) == tiny_params(run={"seed": 7})
    assert load(path).run.seed == 7


@pytest.mark.parametrize("digits", [17, 24, 5_000])
def test_numbers_beyond_any_machine_are_refused(digits: int) -> None:
    """A seed of 24 digits ended the first stage in torch; one of 5,000 cannot even be printed."""
    for values in (
        tiny_values(run={"seed": 10**digits}),
        tiny_values(run={"seed": "1" + "0" * digits}),
        tiny_values(measure_costs={"batches": [1, 10**digits]}),
        with_constraint(metric="params", at_most=10**digits),
    ):
        [line] = problems(values)
        assert line.startswith(("run", "measure_costs", "targets.small.constraints.limit"))
        assert len(line) < 300


def test_many_problems_are_cut_and_long_values_too() -> None:
    lines = problems(tiny_values(run={f"key_{index}": "x" * 10_000 for index in range(1_000)}))
    assert lines[-1] == "and 980 more problems"
    assert max(map(len, problems(tiny_values(run={"dtype": "x" * 10_000, "k" * 10_000: 1})))) < 300


@pytest.mark.parametrize("label", ["two\nlines", "a\x00b", "\x1b[31m", "  ", "\u2028", "x" * 81])
def test_a_label_is_a_line_of_text(label: str) -> None:
    [line] = problems(tiny_values(targets={"small": {**tiny_values()["targets"]["small"], "label": label}}))
    assert line.startswith("targets.small.label: ")


def test_labels_differ() -> None:
    target = tiny_values()["targets"]["small"]
    assert problems({**tiny_values(), "targets": {"one": target, "two": target}}) == [
        "targets.two.label is that of one too; tables and figures tell children by it, so change one"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "is not valid YAML"),
        ("key: value: other", "is not valid YAML"),
        ("- run", "must hold sections, found list"),
        ("", "must hold sections, found NoneType"),
    ],
)
def test_what_is_no_mapping_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        load(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params.yaml is missing; run from the project's root"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({**tiny_values(), "distil_blocks": {}}, "distil_blocks", "distill_blocks"),
        (tiny_values(distill_blocks={"learning_rat": 0.1}), "distill_blocks.learning_rat", "learning_rate"),
        (
            tiny_values(prepare_corpus={"sources": [{}, {"kind": "files", "path": "a.txt", "wieght": 2}]}),
            "prepare_corpus.sources.1.wieght",
            "weight",
        ),
        (
            tiny_values(measure_accuracy={"tasks": [{"name": "own", "promt": ""}]}),
            "measure_accuracy.tasks.0.promt",
            "prompt",
        ),
        (tiny_values(targets={"small": {"lable": "x"}}), "targets.small.lable", "label"),
        (
            with_constraint(metric="params", at_most_ration=0.5, at_most=1),
            "targets.small.constraints.limit.at_most_ration",
            "at_most_ratio",
        ),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_known_one(
    values: dict[str, Any], key: str, nearest: str
) -> None:
    assert any(
        line.startswith(f"unknown key {key}, did you mean {nearest}? (known here: ") for line in problems(values)
    )


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    assert problems(tiny_values(run={"zzz": 1})) == [
        "unknown key run.zzz (known here: device, dtype, seed, threads, workers)"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"run": {"threads": 0}}, "run.threads: Input should be greater than or equal to 1 (found 0)"),
        ({"run": {"seed": -1}}, "run.seed: Input should be greater than or equal to 0 (found -1)"),
        ({"run": {"dtype": "float16"}}, "run.dtype: Input should be 'auto', 'bfloat16' or 'float32' (found 'float16')"),
        ({"run": {"device": "gpu"}}, "run.device: Input should be 'auto', 'cpu' or 'cuda' (found 'gpu')"),
        ({"run": {"threads": "many"}}, "run.threads: Input should be a valid integer"),
        ({"run": {"threads": 2.5}}, "run.threads: Input should be a valid integer"),
        ({"prepare_corpus": {"seq_len": 4}}, "prepare_corpus.seq_len: Input should be greater than or equal to 8"),
        ({"distill_blocks": {"learning_rate": 0}}, "distill_blocks.learning_rate: Input should be greater than 0"),
        ({"distill_blocks": {"learning_rate": 2}}, "distill_blocks.learning_rate: Input should be less than"),
        ({"distill_blocks": {"learning_rate": float("nan")}}, "distill_blocks.learning_rate: Input should be a finite"),
        ({"distill_blocks": {"warmup": 1}}, "distill_blocks.warmup: Input should be less than 1"),
        (
            {"distill_blocks": {"ffn_ratios": [0.5, -0.5]}},
            "distill_blocks.ffn_ratios.1: Input should be greater than 0",
        ),
        ({"distill_blocks": {"ffn_ratios": [1.5]}}, "distill_blocks.ffn_ratios.0: Input should be less than or equal"),
        ({"distill_blocks": {"ffn_ratios": [float("inf")]}}, "distill_blocks.ffn_ratios.0: Input should be a finite"),
        ({"distill_blocks": {"ffn_ratios": 0.5}}, "distill_blocks.ffn_ratios: expected a list (found 0.5)"),
        ({"measure_costs": {"batches": [8, 0]}}, "measure_costs.batches.1: Input should be greater than or equal to 1"),
        ({"measure_costs": {"scenarios": ["128x128"]}}, "measure_costs.scenarios.0: expected INPUT/OUTPUT lengths"),
        (
            {"cache_activations": {"mode": "roling"}},
            "cache_activations.mode: Input should be 'materialised' or 'rolling'",
        ),
        ({"prepare_corpus": {"sources": []}}, "prepare_corpus.sources: Tuple should have at least 1 item"),
        (
            {"measure_accuracy": {"tasks": [{"name": "own", "prompt": "{question"}]}},
            "measure_accuracy.tasks.0.prompt: expected '}' before end of string",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(overrides: dict[str, Any], expected: str) -> None:
    [line] = problems(tiny_values(**overrides))
    assert line.startswith(expected)


@pytest.mark.parametrize("value", ["Auto", 0, 1.5, None, [2]])
def test_a_value_of_a_union_is_one_line(value: object) -> None:
    found = "nothing" if value is None else repr(value)
    assert problems(tiny_values(score_blocks={"sequences_per_batch": value})) == [
        f"score_blocks.sequences_per_batch: expected a whole number of at least 1, or auto (found {found})"
    ]


def test_every_union_and_pattern_says_in_words_what_it_expects() -> None:
    """A wrap validator stands for the words; pydantic's own lines name types, members and regular expressions."""

    def without_words(schema: Any) -> Iterator[Any]:
        if isinstance(schema, list | tuple):
            for part in schema:
                yield from without_words(part)
        elif isinstance(schema, dict) and schema.get("type") != "function-wrap":
            if schema.get("type") == "union" or (schema.get("type") == "str" and "pattern" in schema):
                yield schema
            yield from without_words(list(schema.values()))

    assert list(without_words(Params.__pydantic_core_schema__)) == []


@pytest.mark.parametrize("root", ["s3://puzzle", "s3://a.b-c/runs/x=1/v1.2", "s3://puzzle/..x"])
def test_a_bucket_and_folder_that_s3_takes(root: str) -> None:
    assert tiny_params(storage={"root": root}).storage.root == root


@pytest.mark.parametrize(
    "root",
    [
        *("s3://bucket/../x", "s3://bucket/x/.", "s3://bucket..x/y", "s3://bucket./y", "s3://ab", f"s3://{'b' * 64}"),
        *("s3://bucket/", "bucket/x"),
    ],
)
def test_a_bucket_and_folder_that_s3_does_not_take(root: str) -> None:
    [line] = problems(tiny_values(storage={"root": root}))
    assert line.startswith("storage.root: expected s3://bucket or s3://bucket/folder without .. and without a slash")


def test_a_section_that_is_missing_or_empty_is_named() -> None:
    values = tiny_values()
    del values["score_blocks"]
    values["run"] = None
    assert problems(values) == [
        "run: expected a section, which holds KEY: VALUE lines (found nothing)",
        "score_blocks: Field required",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"kind": "files"}, "a source of kind files needs `path`"),
        ({"kind": "hub", "path": "org/data"}, "a source of kind hub needs `revision`"),
        ({"kind": "parquet", "path": "x"}, "Input should be 'embedded', 'encyclopedia', 'written', 'hub' or 'files'"),
    ],
)
def test_a_source_says_what_it_needs(source: dict[str, Any], expected: str) -> None:
    assert any(expected in line for line in problems(tiny_values(prepare_corpus={"sources": [source]})))


SPEED = {"metric": "throughput", "hardware": "h100", "scenario": "128/128"}


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"metric": "params"}, "exactly one of at_most, at_least, at_most_ratio, at_least_ratio"),
        ({"metric": "params", "at_most": 1, "at_most_ratio": 0.5}, "exactly one of"),
        ({"metric": "params", "at_least": 5}, "params takes at_most"),
        ({**SPEED, "at_most_ratio": 2}, "throughput takes at_least"),
        ({**SPEED, "at_least_ratio": 2, "hardware": None}, "throughput needs `hardware` and `scenario`"),
        ({"metric": "latency_ms", "at_most": 5, "hardware": "h100"}, "latency_ms needs `hardware` and `scenario`"),
        ({"metric": "memory_gib", "at_most": 5}, "memory_gib needs `context`"),
        ({"metric": "speed", "at_most": 5}, "metric: unknown metric (metrics: params, block_params, "),
        ({"metric": "params", "at_most": 0}, "at_most: Input should be greater than 0"),
        ({"metric": "params", "at_most_ratio": float("nan")}, "at_most_ratio: Input should be a finite number"),
        (
            {**SPEED, "at_least_ratio": 2, "scenario": "0/128"},
            "scenario: expected INPUT/OUTPUT lengths",
        ),
    ],
)
def test_a_constraint_that_makes_no_sense_is_refused(constraint: dict[str, Any], expected: str) -> None:
    [line] = problems(with_constraint(**constraint))
    assert line.startswith("targets.small.constraints.limit")
    assert expected in line


@pytest.mark.parametrize(
    "constraint",
    [
        {"metric": "kv_bytes", "at_most_ratio": 0.85},
        {"metric": "memory_gib", "at_most": 0.5, "batch": 8, "context": 256},
        {**SPEED, "at_least_ratio": 1.2, "batch": 8},
        {**SPEED, "metric": "latency_ms", "at_most": 100},
    ],
)
def test_constraints_that_make_sense(constraint: dict[str, Any]) -> None:
    assert parse(with_constraint(**constraint), "params.yaml").targets["small"].constraints["limit"].metric


def test_a_target_needs_a_key_that_dvc_can_parse_and_a_constraint() -> None:
    lines = problems(tiny_values(targets={"51b-like": {"label": "51B-like", "constraints": {}}}))
    name = "a name of at most 60 lowercase letters, digits and -, a letter first"
    assert f"targets.51b-like: expected {name} (found '51b-like')" in lines
    assert any(
        line.startswith("targets.51b-like.constraints: Dictionary should have at least 1 item") for line in lines
    )
    values = tiny_values()
    values["targets"] = {}
    assert problems(values) == ["targets: Dictionary should have at least 1 item after validation, not 0"]


def test_budgets_must_fit_into_their_splits() -> None:
    long, longer = 64 * SEQ_LEN, 72 * SEQ_LEN
    for section in ("distill_blocks", "refine_child"):
        other_section = "refine_child" if section == "distill_blocks" else "distill_blocks"
        values = tiny_values(
            **{section: {"tokens": longer}, other_section: {"tokens": long}}, evaluate_child={"tokens": long}
        )
        assert problems(values) == [
            "distill_child.tokens + the most of distill_blocks.tokens, variant_tokens, fit_tokens, refine_child.tokens "
            "is 1408, more than prepare_corpus.train_tokens = 768",
            "evaluate_child.tokens is 1024, more than prepare_corpus.validation_tokens = 128",
        ]


@pytest.mark.parametrize("section", ["distill_blocks", "refine_child", "distill_child"])
def test_scores_and_held_out_losses_share_no_sequence(section: str) -> None:
    two, three = {"held_out_tokens": 2 * SEQ_LEN}, {"held_out_tokens": 3 * SEQ_LEN}
    fits: dict[str, Any] = {"score_blocks": {"tokens": 14 * SEQ_LEN, "initial_tokens": 0}}
    fits |= dict.fromkeys(("distill_blocks", "refine_child", "distill_child"), two)
    tiny_params(**fits)
    assert problems(tiny_values(**fits | {section: three})) == [
        "seq_len x the sequences of score_blocks.tokens + the most of held_out_tokens of distill_blocks, refine_child, "
        "distill_child is 272, more than prepare_corpus.calibration_tokens = 256"
    ]


def test_a_distillation_of_no_tokens_holds_none_out() -> None:
    tiny_params(score_blocks={"tokens": 10 * SEQ_LEN}, distill_child={"tokens": 0, "held_out_tokens": 16 * SEQ_LEN})


@pytest.mark.parametrize("settings", [{"teacher": "streamed"}, {"sequences_per_batch": 2}, {"offload": True}])
def test_what_only_ranks_can_do_needs_ranks(settings: dict[str, Any]) -> None:
    assert problems(tiny_values(distill_child=settings)) == [
        "distill_child: teacher: streamed, offload, and more than one of sequences_per_batch need ranks; set ranks to "
        "1 or more"
    ]
    tiny_params(distill_child={**settings, "ranks": 1})


def test_a_domain_is_held_out_of_the_training_mix() -> None:
    training, other = {"kind": "files", "path": "a.jsonl"}, {"kind": "files", "path": "b.jsonl"}

    def corpus(name: str, source: dict[str, Any], tokens: int = SEQ_LEN) -> dict[str, dict[str, Any]]:
        domains = {name: {"sources": [source], "tokens": tokens}}
        return {"prepare_corpus": {"sources": [training, {"kind": "embedded"}], "domains": domains}}

    tiny_params(**corpus("prose", other))
    for source, shown in (({**training, "text": "body"}, "files a.jsonl"), ({"kind": "embedded"}, "embedded")):
        assert problems(tiny_values(**corpus("prose", source))) == [
            f"prepare_corpus: domains.prose must be held out, and its source {shown} is in `sources` too; "
            "take it out of one of them"
        ]
    [line] = problems(tiny_values(**corpus("training", other)))
    assert line == "prepare_corpus: domains.training: the training mix has this name; choose another"
    [line] = problems(tiny_values(**corpus("prose", other, SEQ_LEN + 1)))
    assert line.startswith("prepare_corpus.domains.prose.tokens is 17, expected a multiple of 16")


def test_budgets_are_whole_batches() -> None:
    overrides: dict[str, Any] = {
        "prepare_corpus": {"train_tokens": 48 * SEQ_LEN + 1},
        "distill_blocks": {"tokens": 31 * SEQ_LEN},
        "score_blocks": {"tokens": 3 * SEQ_LEN, "initial_tokens": 4 * SEQ_LEN},
        "evaluate_child": {"tokens": 100},
    }
    assert problems(tiny_values(**overrides)) == [
        "prepare_corpus.train_tokens is 769, expected a multiple of 16 (prepare_corpus.seq_len)",
        "distill_blocks.tokens is 496, expected a multiple of 64 (seq_len x distill_blocks.sequences_per_step)",
        "score_blocks.tokens is 48, expected a multiple of 32 (a sequence x score_blocks.sequences_per_batch)",
        "evaluate_child.tokens is 100, expected a multiple of 16 (prepare_corpus.seq_len)",
        "score_blocks.initial_tokens must not exceed score_blocks.tokens",
    ]


def test_all_problems_come_in_one_error() -> None:
    values = tiny_values(
        run={"thread": 2, "workers": 0},
        distill_blocks={"learning_rate": "fast"},
        targets={"small": {"label": "", "constraints": {"limit": {"metric": "params"}}}},
    )
    lines = problems(values)
    assert len(lines) == 5
    for part in ("run.thread,", "run.workers:", "learning_rate:", "targets.small.label:", "constraints.limit:"):
        assert sum(part in line for line in lines) == 1, part


def test_an_unknown_target_names_the_nearest() -> None:
    params: Params = tiny_params()
    assert params.target("small").label == "Small"
    with pytest.raises(InputError, match=r"unknown target 'smal', did you mean small\?; known: small"):
        params.target("smal")


def test_params_cannot_be_changed() -> None:
    params = tiny_params()
    with pytest.raises(ValueError, match="frozen"):
        params.run.seed = 3


def test_a_length_scale_that_makes_two_scenarios_one_is_refused() -> None:
    scenarios = ["128/128", "128/256"]
    section = parse_section({"scenarios": scenarios, "length_scale": 0.125}, "test", BenchmarkThroughput)
    assert section.measured_scenarios == {"16/16": "128/128", "16/32": "128/256"}
    with pytest.raises(InputError, match=r"length_scale 0\.001 makes two of the scenarios the same"):
        parse_section({"scenarios": scenarios, "length_scale": 0.001}, "test", BenchmarkThroughput)


@pytest.mark.parametrize(
    ("section", "field", "item"),
    [
        *(("measure_costs", field, "roofline") for field in ("timings", "hardware", "engines")),
        *(("measure_costs", field, 1) for field in ("tensor_parallel", "batches")),
        ("measure_costs", "scenarios", "128/128"),
        ("benchmark_throughput", "engines", "torch"),
        *(("benchmark_throughput", field, "128/128") for field in ("scenarios", "modelled_scenarios")),
        ("benchmark_throughput", "batches", 1),
        ("distill_blocks", "spans", 2),
        *((section, "formats", "gguf-f16") for section in ("export_child", "export_parent")),
    ],
)
def test_what_stands_in_a_list_twice_is_refused(section: str, field: str, item: object) -> None:
    """Twice the same batch ended in a table of costs with rows that say the same."""
    assert problems(tiny_values(**{section: {field: [item, item]}})) == [
        f"{section}.{field}: {item!r} stands twice; keep one"
    ]


def test_what_is_measured_in_llama_cpp_is_exported_for_it() -> None:
    """The child is, and the parent beside it, whether an engine or a limit asks."""
    exports = {"export_child": {"formats": ["nemotron-nas"]}, "export_parent": {"formats": ["gguf-f32"]}}
    problem = "measures in llama.cpp, which runs gguf-f16; add it to"
    assert problems(tiny_values(benchmark_throughput={"engines": ["llama.cpp"]}, **exports)) == [
        f"benchmark_throughput.engines {problem} {section}.formats" for section in exports
    ]
    values = with_constraint(**SPEED, at_least_ratio=1.2, engine="llama.cpp")
    values["export_parent"] = exports["export_parent"]
    assert problems(values) == [f"targets.small.constraints.limit {problem} export_parent.formats"]
    parse(tiny_values(**exports), "params.yaml")


def test_no_target_is_called_as_the_parent_is() -> None:
    values = tiny_values()
    values["targets"]["parent"] = {**values["targets"]["small"], "label": "Another"}
    assert problems(values) == ["targets.parent: `parent` stands for the parent itself; choose another name"]
