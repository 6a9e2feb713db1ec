"""The params of `run` on the machine at hand."""

from storage.params import Params
from tasks.puzzle.device import resolve


def on_this_machine(params: Params) -> Params:
    """`params` with run.device and run.dtype as they come out here: keys of pieces hold no `auto`."""
    device, dtype = resolve(params.run.device, params.run.dtype)
    return params.model_copy(update={"run": params.run.model_copy(update={"device": device, "dtype": dtype})})
