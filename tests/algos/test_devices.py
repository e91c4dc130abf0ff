"""A method gives the same on every device that this machine has, and leaves its result there."""

from typing import Any

import pytest
import torch

from cases import MODULE, SAMPLE, Case, close, dense, in_full, merged, only
from merge_algos import RankRule
from merge_algos.merge import build, build_post, merge_module
from merge_algos.methods import registry
from merge_algos.post import registry as post_registry
from merge_algos.protocol import ModuleContext

DEVICES = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]


def on(device: str, method: str, case: Case, *post: str) -> Any:
    """What is shipped of float32 factors on that device."""
    steps = [build_post(name, {}) for name in post]
    deltas = [delta.to(torch.float32, device) for delta in case.deltas]
    context = ModuleContext(MODULE, 0, RankRule(max=in_full(method, case)))
    return merge_module(build(method, {}), deltas, case.weights, context, torch.float32, steps).delta


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", registry())
def test_float32_on_a_device_is_float64_on_the_cpu_but_for_rounding(method: str, device: str) -> None:
    case = SAMPLE.fit(method)
    expected, _ = only(merged(method, case))
    shipped = on(device, method, case)
    assert shipped.B.device == torch.device(device)
    assert close(dense(shipped.to(torch.float64, "cpu")), expected, case.scale, tolerance=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", post_registry())
def test_a_post_step_stays_on_the_device(step: str, device: str) -> None:
    shipped = on(device, "task_arithmetic", SAMPLE, step)
    assert shipped.B.device == torch.device(device)
    assert close(dense(shipped.to(torch.float64, "cpu")), dense(on("cpu", "task_arithmetic", SAMPLE, step)), SAMPLE.scale, 1e-5)
