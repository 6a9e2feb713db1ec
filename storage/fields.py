"""The parts of the models of params.yaml: the base of all sections, and types that several share."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

Best = Literal["best"]
"""A batch or a tensor-parallel degree that the search chooses."""

MAX_NUMBER = 10**15
"""No number of params.yaml is larger: a petabyte in bytes, and within what int64 and float64 hold exactly."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, numbers finite and at most MAX_NUMBER."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _numbers_are_sane(self) -> Self:
        for name, value in self:
            if any(abs(number) > MAX_NUMBER for number in _numbers(value)):
                raise ValueError(f"{name} is beyond {MAX_NUMBER:.0e}, more than any machine has or counts")
        return self


def expecting(words: str) -> WrapValidator:
    """Return what says in words what a type expects, in one line whatever is wrong: pydantic has one a union's member.

    Every union and every pattern in a section has it; tests/storage/test_params.py sees to that.
    """

    def checked(value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise PydanticCustomError("expecting", "expected {words}", {"words": words}) from None

    return WrapValidator(checked)


AtOnce = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], expecting("a whole number of at least 1, or auto")]
"""How many of something a stage takes at once: a number, or auto, which is one on a given machine."""


def resolved(count: AtOnce) -> int:
    """Return how many at once; tasks.engines.machine.on_this_machine has put a number in place of `auto`."""
    assert count != "auto", "params were not resolved"
    return count


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a field; sections within look after their own."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
