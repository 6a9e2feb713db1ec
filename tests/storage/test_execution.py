"""Keys of `execution` that contradict each other, and that none of them reruns anything."""

from typing import Any

import pytest
import yaml

from storage.files import InputError
from storage.params import parse
from tests.clone import ROOT
from tests.settings import tiny_params, tiny_values


@pytest.mark.parametrize(
    ("execution", "problem"),
    [
        ({"runner": "ray"}, "runner ray needs `address`, HOST:PORT of the cluster's head"),
        ({"runner": "ray", "address": "ray://head:1"}, "execution.address: expected HOST:PORT such as head:6379"),
        ({"runner": "ray", "address": "head:6379", "devices": ["cuda:0"]}, "set devices to auto"),
        ({"runner": "processes", "gpus": 1, "address": "head:1"}, "address, gpus without runner ray"),
        ({"devices": ["cuda:1", "cuda:1"]}, "devices names one of cuda:1, cuda:1 twice"),
        ({"devices": []}, "execution.devices: expected auto or a list such as [cuda:0, cuda:1] (found [])"),
        ({"devices": ["cpu"]}, "execution.devices: expected auto or a list such as [cuda:0, cuda:1] (found ['cpu'])"),
        ({"devices": "cuda:0"}, "execution.devices: expected auto or a list such as [cuda:0, cuda:1] (found 'cuda:0')"),
        ({"devices": ["cuda:0", "cuda:00"]}, "[cuda:0, cuda:1] (found ['cuda:0', 'cuda:00'])"),
        ({"runner": "ray", "address": "[::1]:6379"}, "HOST being a name or an IPv4 address (found '[::1]:6379')"),
        (
            {"runner": "ray", "address": "head:1", "gpus": 1.5},
            "a share of one, 0.0001 at least, or a whole number (found",
        ),
        (
            {"runner": "ray", "address": "head:1", "gpus": 1e-9},
            "a share of one, 0.0001 at least, or a whole number (found",
        ),
        ({"runner": "ray", "address": "head:1", "cpus": 1e-9}, "greater than or equal to 0.0001 (found 1e-09)"),
        ({"runner": "dask"}, "Input should be 'threads', 'processes' or 'ray' (found 'dask')"),
    ],
)
def test_what_cannot_be_is_refused(execution: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(tiny_values(execution=execution), "params.yaml")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_named_in_devices_alone() -> None:
    """Its number in run.device would go into every key."""
    with pytest.raises(InputError, match=r"run.device: Input should be 'auto', 'cpu' or 'cuda'"):
        tiny_params(run={"device": "cuda:1"})


def test_params_without_the_section_run_on_threads() -> None:
    values = tiny_values()
    del values["execution"]
    assert parse(values, "params.yaml").execution.runner == "threads"


def test_no_stage_is_rerun_for_it() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    watched = [key for stage in stages for key in stage.get("do", stage)["params"]]
    assert not [key for key in watched if key.partition(".")[0] == "execution"]
