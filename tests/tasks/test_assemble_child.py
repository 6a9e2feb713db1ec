"""assemble_child: a checkpoint of any variants of the library computes what its parts computed in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from storage.corpus import read_sequences
from storage.files import InputError
from storage.library import Library, entry_name, whole_name
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.child import DeciLMForCausalLM  # importing it is what makes children load
from tasks.puzzle.model.initialise import Tensors, attention_part, ffn_part
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.runtimes.rules import is_empty
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tests.stages import assemble_blocks, cache, distill, prepare

CPU = torch.device("cpu")
ATTENTIONS = (Attention("gqa", 2), Attention("gqa", 1), Attention("linear"), Attention("no_op"))
FFNS = (Ffn("gated", 96), Ffn("gated", 48), Ffn("gated", 24), Ffn("linear"), Ffn("no_op"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """Make three blocks, every kind of variant, spans of two."""
    params, paths = prepare("qwen2", tmp_path_factory.mktemp("library"), distill_blocks={"linear": True, "spans": [2]})
    cache(params, paths)
    distill(params, paths)
    return params, paths


@st.composite
def architectures(draw: st.DrawFn) -> list[Replacement]:
    """Draw an exact cover of three blocks by blocks and spans of two, any variants."""
    spans = draw(st.sampled_from([(1, 1, 1), (1, 2), (2, 1)]))
    starts = [sum(spans[:position]) for position in range(len(spans))]
    halves = st.tuples(st.sampled_from(ATTENTIONS), st.sampled_from(FFNS))
    return [Replacement(first, span, *draw(halves)) for first, span in zip(starts, spans, strict=True)]


def trained_outputs(blocks: list[Replacement], tokens: Tensor, paths: Paths) -> Tensor:
    """Return logits of the subblocks as BLD ran them: a variant's attention, then its FFN, in the parent's block."""
    parent, library = Parent(paths.parent), Library(paths.library)
    config = parent.config
    parents = parent_attention(config), parent_ffn(config)
    embedding, norm, head = parent.outside(CPU, torch.float32)
    hidden = functional.embedding(tokens, embedding)
    rotary = rotary_for(config, tokens.shape[1], hidden)
    for replacement in blocks:
        first_block, span = replacement.first_block, replacement.span
        base = parent.block(first_block, CPU, torch.float32)
        if span > 1:
            base = library.read(whole_name(first_block, span))
        attention_weights, ffn_weights = attention_part(base), ffn_part(base)
        if replacement.attention not in parents:
            attention_weights = read_variant(library, replacement.attention, replacement)
        if replacement.ffn not in parents:
            ffn_weights = read_variant(library, replacement.ffn, replacement)
        first = Block.load(config, replacement.attention, parents[1], attention_weights | ffn_part(base))
        second = Block.load(config, parents[0], replacement.ffn, attention_part(base) | ffn_weights)
        hidden = second.feed_forward(first.attend(hidden, rotary))
    normalised = functional.rms_norm(hidden, hidden.shape[-1:], norm, config.rms_norm_eps)
    return functional.linear(normalised, head)


def read_variant(library: Library, variant: Attention | Ffn, replacement: Replacement) -> Tensors:
    """Return trained tensors of a variant; none of a no-op."""
    if variant.kind == "no_op":
        return {}
    return library.read(entry_name(replacement.first_block, variant, replacement.span))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=architectures().filter(lambda blocks: not is_empty([(block.attention, block.ffn) for block in blocks])))
def test_a_checkpoint_computes_what_its_halves_did_in_training(
    blocks: list[Replacement], library: tuple[Params, Paths]
) -> None:
    params, paths = library
    assemble_blocks(params, paths, blocks)
    model: Any = AutoModelForCausalLM.from_pretrained(paths.assembled("small")).train(False)
    assert isinstance(model, DeciLMForCausalLM)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", 0, 2)).long()
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, trained_outputs(blocks, tokens, paths), atol=1e-5, rtol=1e-4)
    kept = sum(replacement.attention.kind == "gqa" for replacement in blocks)
    assert sum(name.endswith("k_proj.weight") for name in model.state_dict()) == kept


def test_a_child_with_nothing_in_its_blocks_is_refused(library: tuple[Params, Paths]) -> None:
    params, paths = library
    empty = [Replacement(0, 2, ATTENTIONS[3], FFNS[4]), Replacement(2, 1, ATTENTIONS[3], FFNS[4])]
    with pytest.raises(InputError, match=r"architecture.json: no block has an attention or an FFN, .* loosen targets"):
        assemble_blocks(params, paths, empty)


def test_all_of_the_parents_blocks_are_the_parent(library: tuple[Params, Paths]) -> None:
    """To the byte."""
    params, paths = library
    assemble_blocks(params, paths, [Replacement(index, 1, ATTENTIONS[0], FFNS[0]) for index in range(3)])
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", 0, 2)).long()
    source = Path(params.prepare_parent.source)
    with torch.inference_mode():
        child, parent = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (paths.assembled("small"), source)
        )
    torch.testing.assert_close(child, parent, atol=1e-6, rtol=1e-5)
