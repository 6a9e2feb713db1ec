"""Checkpoints as people have them: each is refused in one sentence, or taken with transformers' own logits.

Run: `python -m tests.faults.checkpoints --count 200`. A tiny checkpoint of a supported family is changed (fields of
config.json, tensors, shards and index, tokenizer, links) and given to prepare_parent, and to what `puzzle export` asks
of a checkpoint. What is taken must compute what transformers computes from the same folder.
"""

import functools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn
from tasks.checkpoints.exports import check, read_checkpoint
from tasks.prepare_parent import prepare_parent
from tasks.puzzle.model.child import build
from tasks.puzzle.model.device import Compute
from tests.clone import Ended
from tests.faults.forks import Caught, in_fork
from tests.faults.outcomes import Outcome, Settings, end_of, last_words, run_campaign
from tests.settings import tiny_params
from tests.tiny import FAMILIES, save_tiny, save_tokenizer

_SECONDS = 60
_TOLERANCE = 1e-4
"""Between two float32 forward passes whose sums are in another order; logits of these models are near 1."""
_OTHER_LOGITS = "OTHER LOGITS"
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        0.5,
        1e-5,
        1e300,
        10**6,
        10**12,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "a",
    ),
    *(
        "4",
        "silu",
        "gelu",
        "gelu_new",
        "relu",
        "swish",
        "relu2",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        [],
        [1],
        {},
        {"a": 1},
    ),
    *(
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"type": "linear", "factor": 2},
        {"rope_type": "yarn"},
    ),
    *(
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
    *({"rope_type": "default", "rope_theta": "1e4"}, {"rope_theta": 5e5}, "{{", "🙂", ["LlamaForCausalLM"]),
)
_FIELDS = (
    *("architectures", "model_type", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "rope_parameters"),
    *("rope_theta", "rope_scaling", "max_position_embeddings"),
    *(
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "quantization_config",
        "torch_dtype",
        "dtype",
        "bos_token_id",
    ),
    *(
        "eos_token_id",
        "pad_token_id",
        "auto_map",
        "partial_rotary_factor",
        "attn_logit_softcapping",
        "attention_multiplier",
    ),
    *("logits_scaling", "embedding_multiplier", "residual_multiplier"),
    *("pretraining_tp", "text_config", "qkv_bias", "block_configs", "per_layer_config"),
    *("no_bias", "max_window_layers", "rotary_dim", "is_encoder_decoder", "transformers_weights"),
)
_JSON = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"a"',
    b"{}",
    b"[" * 50_000,
    b'{"a": ' * 9_000,
    b"\xff\xfe{\x00}\x00",
    b"{'a': 1}",
    b"\x00",
)
_EXTRA = (
    *("model.layers.0.self_attn.rotary_emb.inv_freq",),
    *("model.layers.1.self_attn.q_proj.bias", "lm_head.weight"),
    *("model.layers.0.self_attn.q_proj.weight_scale",),
    *("model.layers.0.self_attn.q_norm.weight", "lm_head.bias"),
    *(
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.embed_positions.weight",
    ),
    *("score.weight", "model.layers.0.mlp.gate_proj.bias", "model.layers.0.self_attn.o_proj.bias", "a", ""),
)


# --- changes ---------------------------------------------------------------------------------------------------------


def _config_field(chance: random.Random, folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    names = [*_FIELDS, *config]
    stories = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        name = chance.choice(names)
        if name in config and chance.random() < 0.25:
            del config[name]
            stories.append(f"without {name}")
        else:
            config[name] = chance.choice(_VALUES)
            stories.append(f"{name} = {config[name]!r}")
    (folder / "config.json").write_text(json.dumps(config))
    return ", ".join(stories)


def _json_file(chance: random.Random, folder: Path) -> str:
    file = chance.choice(sorted(folder.glob("*.json")))
    data = file.read_bytes()
    if chance.random() < 0.5:
        data = chance.choice(_JSON)
    else:
        position = chance.randrange(len(data))
        data = (
            data[:position]
            + chance.choice((b"", b"}", b"\xff", b'"', b"NaN", b"1"))
            + data[position + chance.randint(0, 3) :]
        )
    file.write_bytes(data)
    return f"{file.name} is {len(data)} bytes: {data[:20]!r}"


def _tensor(chance: random.Random, folder: Path) -> str:
    """Plant another type, shape, value or name of a tensor, a tensor less, or one more."""
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    match chance.randrange(8):
        case 0:
            story = "in another type"
            types = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool)
            tensors[name] = tensor.to(chance.choice(types))
        case 1:
            story, tensors[name] = (
                "of another shape",
                chance.choice((tensor[1:], tensor.flatten(), tensor[None], tensor[:0])),
            )
        case 2:
            story = "with a value that is no number"
            tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
        case 3:
            new = chance.choice(
                (f"base_model.{name}", name.removeprefix("model."), name.replace("self_attn", "attn"), f"{name} ")
            )
            story, tensors[new] = f"named {new}", tensors.pop(name)
        case 4:
            story = "taken out"
            del tensors[name]
        case 5:
            story = "transposed"
            tensors[name] = tensor.t().contiguous() if tensor.dim() > 1 else tensor.flip(0)
        case _:
            name = chance.choice(_EXTRA)
            shape = chance.choice(((48,), (4,), (96, 48), (160, 48), (1,)))
            story, tensors[name] = f"added, of shape {shape}", torch.ones(shape)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt"})
    if chance.random() < 0.7:
        _index_anew(folder)
    return f"{name} {story} in {file.name}"


def _index_anew(folder: Path) -> None:
    weight_map = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(chance: random.Random, folder: Path) -> str:
    """Damage files and index of the tensors."""
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    file = chance.choice(files)
    everything = {name: tensor for shard in files for name, tensor in load_file(shard).items()}
    weight_map: dict[str, str | int] = {name: shard.name for shard in files for name in load_file(shard)}
    name = chance.choice(sorted(weight_map))
    match chance.randrange(8):
        case 0:
            story = "one file with other weights beside the shards"
            save_file(
                {key: tensor + 0.01 for key, tensor in everything.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
        case 1:
            story = f"{file.name} cut short"
            os.truncate(file, chance.randrange(file.stat().st_size))
        case 2:
            story = f"{file.name} gone"
            file.unlink()
        case 3:
            weight_map[name] = chance.choice(
                ("../x.safetensors", "/etc/shadow", "", "x\x00y", "absent.safetensors", file.name, ".", 5)
            )
            story = f"{name} in {weight_map[name]!r}"
            index.write_text(json.dumps({"weight_map": weight_map}))
        case 4:
            story = "no index"
            index.unlink()
        case 5:
            outside = folder.parent / "outside.safetensors"
            file.rename(outside)
            weight_map = {
                key: "../outside.safetensors" if value == file.name else value for key, value in weight_map.items()
            }
            index.write_text(json.dumps({"weight_map": weight_map}))
            story = f"{file.name} moved out of the folder"
        case 6:
            data = bytearray(file.read_bytes())
            position = chance.randrange(min(len(data), 400))
            data[position] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
            story = f"bit at {position} of {file.name} flipped"
        case _:
            del weight_map[name]
            index.write_text(json.dumps({"weight_map": weight_map}))
            story = f"{name} not in the index"
    return story


def _link(chance: random.Random, folder: Path) -> str:
    """Put a link, a folder or a pipe in place of a file."""
    name = chance.choice(
        ("tokenizer_secret.json", "LICENSE", "README.md", "generation_config.json", "config.json", "tokenizer.json")
    )
    path = folder / name
    kept = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    form = chance.choice(("link out", "link to itself", "dead link", "folder", "pipe"))
    match form:
        case "link out":
            (folder.parent / "secret").write_bytes(kept)
            path.symlink_to(folder.parent / "secret")
        case "link to itself":
            path.symlink_to(path)
        case "dead link":
            path.symlink_to(folder / "absent")
        case "folder":
            path.mkdir()
        case _:
            os.mkfifo(path)
    return f"{name} is a {form}"


def _side_file(chance: random.Random, folder: Path) -> str:
    """Write tokenizer, card and licence in forms that people have."""
    name = chance.choice(
        (
            "README.md",
            "tokenizer_config.json",
            "tokenizer.json",
            "LICENSE",
            "chat_template.jinja",
            "generation_config.json",
        )
    )
    data = chance.choice(
        (
            *(
                b"",
                b"\xff\xfe\x00",
                b"---\nlicense: [a, 'b']\n---\n",
                b"---\nlicense: !!python/object a\n---\n",
                b"---\n: [\n---\n",
            ),
            *(b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', b"{{ messages", b"\x00" * 100, b"[" * 9_000),
        )
    )
    (folder / name).write_bytes(data)
    return f"{name} is {data[:30]!r}"


_CHANGES: dict[str, tuple[Callable[[random.Random, Path], str], int]] = {
    "config field": (_config_field, 6),
    "JSON file": (_json_file, 3),
    "tensor": (_tensor, 5),
    "shards and index": (_shards, 4),
    "link": (_link, 1),
    "side file": (_side_file, 1),
}


# --- what becomes of them --------------------------------------------------------------------------------------------


def faults(settings: Settings) -> Iterator[Outcome]:
    """Change a checkpoint, and give it to prepare_parent or to export."""
    with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="checkpoints-") as folder:
        root = Path(folder)
        for family in FAMILIES:
            save_tiny(family, root / family)
            save_tokenizer(root / family)
            (root / family / "README.md").write_text("---\nlicense: mit\n---\n")
        for number in range(settings.count):
            chance, work = settings.chance(number), root / str(number)
            family = chance.choice(FAMILIES)
            kind = chance.choices(list(_CHANGES), [weight for _, weight in _CHANGES.values()])[0]
            shutil.copytree(root / family, work / "source")
            story = f"fault {number}: {family}, {_CHANGES[kind][0](chance, work / 'source')}"
            taken = _prepared if number % 2 else _exported
            ended = in_fork(functools.partial(taken, work, root / family), _SECONDS, work)
            yield _judged(kind, f"{story}, {taken.__name__.strip('_')}", ended and Ended(*ended))
            shutil.rmtree(work)


def _judged(kind: str, story: str, ended: Ended | None) -> Outcome:
    verdict, words = end_of(ended), last_words(ended)
    if ended and verdict is None and _OTHER_LOGITS in ended.out:
        verdict, words = "wrong", ended.out.strip()[-300:]
    elif ended and verdict is None:
        words = "taken" if ended.code == 0 else words
    return Outcome(kind, verdict or "right", f"{story} -> {words}")


def _prepared(work: Path, before: Path) -> None:
    """Take the checkpoint as the parent; compare it with transformers where it is taken."""
    source = work / "source"
    paths = Paths(work / "artifacts")
    try:
        prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    except InputError as error:
        _refuse(error)
    parent = Parent(paths.parent)
    tensors = {name: parent.checkpoint.tensor(name) for name in parent.checkpoint.files}
    config = parent.config
    block = (Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))
    _compare(source, before, config, [block] * config.num_blocks, tensors)


def _exported(work: Path, before: Path) -> None:
    """Check the checkpoint as `puzzle export` does; compare its tensors with transformers where it is taken."""
    source = work / "source"
    try:
        taken = read_checkpoint("tiny", source, "the export again", is_foreign=True)
        check(taken, ("nemotron-nas",), "--formats")
        tensors = {name: taken.checkpoint.tensor(name) for name in taken.checkpoint.files}
    except InputError as error:
        _refuse(error)
    _compare(source, before, taken.config, list(taken.blocks), tensors)


def _refuse(error: InputError) -> None:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)


def _compare(source: Path, before: Path, config: ModelConfig, blocks: list[Any], tensors: dict[str, Any]) -> None:
    """Say where the logits are not those of transformers, which loads the same folder.

    Where it refuses the folder, such as for a `use_cache` that is no switch, the change must be none to the model: the
    logits are those of the folder before it.
    """
    tokens = torch.randint(0, min(config.vocab_size, 160), (1, 12), generator=torch.Generator().manual_seed(0))
    caught, refusal = Caught(), ""
    with caught:
        expected = _transformers_logits(source, tokens)
    if caught.error is not None:
        refusal = f", and transformers refuses it ({type(caught.error).__name__}: {str(caught.error)[:200]})"
        expected = _transformers_logits(before, tokens)
    with torch.inference_mode():
        logits = build(config, blocks, tensors, Compute(torch.device("cpu"), torch.float32))(tokens).logits
    error = (logits - expected).abs().max().item() if logits.shape == expected.shape else float("inf")
    if not error <= _TOLERANCE:
        sys.stdout.write(f"{_OTHER_LOGITS}: {error:.3g} off{refusal}")


def _transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        logits: Tensor = model.train(False)(tokens).logits
    return logits


if __name__ == "__main__":
    run_campaign("checkpoints", "Checkpoints as people have them, taken or refused.", 200, faults)
