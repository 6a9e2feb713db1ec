"""Chats as people store them: a list of messages goes in, turns that a chat template can render come out.

Read are {role, content} and ShareGPT's {from, value}; a content that is text, a list of text parts, or null beside tool
calls; arguments of tool calls as a mapping or as JSON text. What is no text (images, audio) is refused with its reason.
"""

import json
from collections.abc import Mapping
from typing import Any

from storage.documents import Message

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in ShareGPT's form, and those that templates know."""
_READ_BY_TEMPLATES = ("name", "tool_call_id", "reasoning_content")


class NoChatError(ValueError):
    """A value holds no text, or no chat of text; the message goes on after the column's name, one for each kind."""


def messages_of(value: Any) -> tuple[Message, ...]:
    """Return the turns of a chat; none where there is nothing in it.

    Raises:
        NoChatError: it is no list of messages, or a message holds something else than text and tool calls.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise NoChatError(f"must hold a list of messages, found {type(value).__name__}")
    return tuple(_message(turn) for turn in value if turn is not None)


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise NoChatError(f"must hold messages with `role` and `content`, found {type(turn).__name__}")
    calls = _tool_calls(turn)
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or not (calls or {"content", "value"} & turn.keys()):
        keys = ", ".join(sorted(map(str, turn))) or "none"
        raise NoChatError(f"must hold messages with `role` and `content` (or `from` and `value`), found keys {keys}")
    content = next((turn[key] for key in ("content", "value", "refusal") if turn.get(key) is not None), None)
    fields = {key: turn[key] for key in _READ_BY_TEMPLATES if isinstance(turn.get(key), str)}
    fields |= {"tool_calls": calls} if calls else {}
    return Message(
        _ROLES.get(role.lower(), role), _text(content), json.dumps(fields, ensure_ascii=False) if fields else ""
    )


def _text(content: Any) -> str:
    """Return a content as text; parts of text are joined by line ends."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NoChatError(f"must hold messages of text, found {type(content).__name__}")
    return "\n".join(_part(part) for part in content)


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise NoChatError(f"must hold messages of text, found a part of type {kind}")


def _tool_calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return tool calls as templates take them: arguments are a mapping. OpenAI's older `function_call` is one."""
    calls = _parsed(turn.get("tool_calls")) or []
    if turn.get("function_call"):
        calls = [turn["function_call"]]
    if not isinstance(calls, list):
        raise NoChatError(f"must hold `tool_calls` as a list, found {type(calls).__name__}")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(function, Mapping):
        raise NoChatError("must hold tool calls that name their function")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    arguments = _without_nulls(_parsed(function.get("arguments") or {}))
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """Return the JSON value of a text; other values, and texts that are no JSON, as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: Any) -> Any:
    """Return a mapping of Parquet without the keys of other rows, which are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
