"""Chats in the forms in which people store them: the turns of each, and why some have none."""

from typing import Any

import pytest

from storage.chats import NoChatError, messages_of
from storage.documents import Document, Message, Source

HI = Message("user", "hi")


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "hi"}],
        [{"from": "human", "value": "hi"}],
        [{"role": None, "content": None, "from": "human", "value": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi", "image_url": None}]}],
        [{"role": "user", "content": "hi", "tool_calls": None, "name": None, "weight": 1}],
        [None, {"role": "user", "content": ["hi"]}],
    ],
)
def test_forms_of_the_same_chat(turns: list[Any]) -> None:
    assert messages_of(turns) == (HI,)


def test_nothing_and_empty_messages() -> None:
    assert messages_of(None) == messages_of([]) == ()
    assert messages_of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]) == (
        HI,
        Message("assistant", ""),
    )


def test_what_is_said_beside_an_empty_content_is_kept() -> None:
    """A refusal, and thoughts, which templates of models that think write: both became an empty answer."""
    refused, thought = messages_of(
        [
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        ]
    )
    assert refused.content == "No."
    assert thought.for_template == {"role": "assistant", "content": "", "reasoning_content": "Hm."}


def test_sharegpts_roles_are_those_of_templates() -> None:
    names = ("system", "human", "gpt", "observation", "function_response")
    turns = messages_of([{"from": name, "value": "x"} for name in names])
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool", "tool"]


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}], "content": None},
        {"tool_calls": '[{"name": "add", "arguments": {"a": 1}}]', "content": ""},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": None},
    ],
)
def test_tool_calls_have_the_form_that_templates_take(turn: dict[str, Any]) -> None:
    (message,) = messages_of([{"role": "assistant", **turn}])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert message.for_template == {"role": "assistant", "content": "", "tool_calls": [call]}
    document = Document("", Source("s", "1", "MIT"), "a#0", (HI, message))
    assert document.content == 'hi\n\n{"name": "add", "arguments": {"a": 1}}', "chats that call otherwise differ"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("hi", "found str"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "found a part of type image_url"),
        ([{"role": "user", "content": 3}], "found int"),
        ([{"role": "user"}], "found keys role"),
        ([{"content": "x"}], "found keys content"),
        ([["user", "hi"]], "found list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "name their function"),
        ([{"role": "assistant", "tool_calls": 3}], "found int"),
    ],
)
def test_what_is_no_chat_of_text_has_a_reason(value: Any, problem: str) -> None:
    with pytest.raises(NoChatError, match=problem):
        messages_of(value)
