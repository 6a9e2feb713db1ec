"""The keys of `execution` in params.yaml: where pieces are computed.

No piece's key holds them and no stage of dvc.yaml names them, so that a change of them reruns nothing.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from storage.fields import Section, expecting

_Gpu = Annotated[str, StringConstraints(pattern=r"^cuda:(0|[1-9][0-9]{0,2})$")]
_Gpus = Annotated[tuple[_Gpu, ...], Field(min_length=1)]
_Address = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$"),
    expecting("HOST:PORT such as head:6379, HOST being a name or an IPv4 address"),
]


class Execution(Section):
    """The place where the pieces of a stage are computed; neither results nor their keys depend on it."""

    runner: Literal["threads", "processes", "ray"] = Field(
        "threads",
        description="threads of the stage's process (one GPU), processes of this machine (all of `devices`), or ray: "
        "all nodes of the cluster at `address`.",
    )
    devices: Annotated[Literal["auto"] | _Gpus, expecting("auto or a list such as [cuda:0, cuda:1]")] = Field(
        "auto",
        description="GPUs of this machine that stages may take: auto (all that are visible), or a list such as "
        "[cuda:0, cuda:1]. A process takes one and keeps it; on a cluster Ray hands them out.",
    )
    address: _Address | None = Field(
        None, description="HOST:PORT of Ray's head, as `ray start --head --port PORT` has it; null without Ray."
    )
    cpus: float | None = Field(None, ge=0.0001, le=1024, description="CPUs of a piece on Ray; null: run.threads.")
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs of a piece on Ray; null: one for run.workers pieces, none on the CPU."
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        le=65536,
        description="Memory of a piece on Ray, which a node has to have left; null: not looked at.",
    )

    @model_validator(mode="after")
    def _fits_the_runner(self) -> Self:
        if self.runner == "ray" and self.address is None:
            raise ValueError("runner ray needs `address`, HOST:PORT of the cluster's head")
        if self.runner == "ray" and self.devices != "auto":
            raise ValueError(
                "on a cluster Ray hands out the GPUs that its nodes were started with; set devices to auto"
            )
        of_ray = {"address": self.address, "cpus": self.cpus, "gpus": self.gpus, "memory_gib": self.memory_gib}
        if self.runner != "ray" and (given := [name for name, value in of_ray.items() if value is not None]):
            raise ValueError(f"{', '.join(given)} without runner ray; set it, or take that out")
        if self.gpus and (self.gpus < 0.0001 or (self.gpus > 1 and not self.gpus.is_integer())):
            raise ValueError(f"gpus is a share of one, 0.0001 at least, or a whole number (found {self.gpus:g})")
        if self.devices != "auto" and len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices names one of {', '.join(self.devices)} twice; keep one")
        return self
