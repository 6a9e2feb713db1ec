"""What the models of params.yaml are made of: the base of all sections, and types that several share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Scenario = Annotated[str, StringConstraints(pattern=r"^[1-9]\d*/[1-9]\d*$")]
"""Input length / output length, in tokens."""


def scaled(scenario: str, factor: float) -> str:
    """A scenario with both lengths times `factor`, at least a token each."""
    return "/".join(str(max(1, round(int(length) * factor))) for length in scenario.split("/"))


Best = Literal["best"]
"""A batch or a tensor-parallel degree that the search chooses."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
