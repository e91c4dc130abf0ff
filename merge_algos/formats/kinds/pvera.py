"""PVeRA: VeRA whose projection is a mean and a variance; what is not sampled is its mean."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Settings
from merge_algos.formats.kinds.vera import VeRA


class PVeRA(VeRA):
    """VeRA with A: (2 r, widest) and d: (2 r), whose first halves are the mean. arXiv:2512.07703."""

    name = "PVeRA"
    paper = "arXiv:2512.07703"
    meaning = "VeRA at the mean, which is what PEFT computes when it does not sample"
    peft_types = ("PVERA",)
    suffixes = MappingProxyType({"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"})
    shared = MappingProxyType({"base_model.pvera_A": "A", "base_model.pvera_B": "B"})
    flags = (VeRA.flags - {"vera_dropout"}) | {"generator_seed", "pvera_dropout", "sample_at_inference"}
    means = 2

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        if fields.flag(config, "sample_at_inference"):
            reason = "it draws another delta at every pass"
            raise UnsupportedAdapter("adapter_config.json: sample_at_inference", reason, "set it to false to merge the mean")
        return super().settings(config, modules)
