"""The certificate of a merge, an extraction or a grounding: what was lost, module by module, and in all."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.recipe import Recipe
from merge_algos import catalogue
from merge_algos.extract import Extract
from merge_algos.ground import Ground
from merge_algos.merge import ModuleReport
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import AdapterManifest, BaseManifest, named_parts

_OF_TASKS = ("name", "input", "licence", "input_bytes", "relative_error", "grounded")
_NOISE = 1e-6  # of the largest norm: below it a module is what float32 leaves of a sum that cancels


def certificate(
    recipe: Recipe,
    inputs: Sequence[tuple[Digest, AdapterManifest]],
    modules: Sequence[ModuleReport],
    *,
    rank: int,
    training: Mapping[str, Any] | None = None,
    grounded: Sequence[Mapping[str, Any]] = (),
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`report.json`. Errors are relative Frobenius norms, energies fractions of squared norms; totals are over all modules.

    training: how the coefficients were learned, where they were.  grounded: as `grounded_section` gives it, of the inputs that
    were; what they lost before the merge is in no total but `exact`, because only a linear method passes it on as it is.
    extras: what became of what the adapters hold beside their deltas, of which totals know nothing.
    """
    cut = [each for each in grounded if not each["exact"]]
    return {
        **({"training": training} if training else {}),
        **({"grounded": list(grounded)} if grounded else {}),
        **({"extras": dict(extras)} if extras else {}),
        "schema": 1,
        "recipe": recipe.to_json(),
        "recipe_digest": str(recipe.digest),
        "paper": catalogue.find(recipe.method).paper,
        "inputs": [_input(digest, manifest) for digest, manifest in inputs],
        "totals": {**_totals(modules, rank), **({"exact": False} if cut else {})},
        "worst_module": _worst(modules),
        "modules": [asdict(module) for module in modules],
    }


def grounding_certificate(
    recipe: Recipe, adapter: tuple[Digest, AdapterManifest], base: str, modules: Sequence[ModuleReport], *, rank: int
) -> dict[str, Any]:
    """`report.json` of an adapter made a plain LoRA, as of a merge of it alone. base: where its weights came from."""
    return {
        "schema": 1,
        "kind": "grounding",
        "recipe": recipe.to_json(),
        "recipe_digest": str(recipe.digest),
        "paper": Ground.paper,
        "base": base,
        "inputs": [_input(*adapter)],
        "totals": {**_totals(modules, rank), "norm": math.sqrt(math.fsum(m.norm**2 for m in modules))},
        "worst_module": _worst(modules),
        "modules": [asdict(module) for module in modules],
    }


def grounded_section(name: str, grounded: Digest, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge says of one grounded input. name: the task's.  grounded: the plain LoRA.  report: its certificate."""
    totals = report["totals"]
    kept = ("norm", "relative_error", "retained_energy", "rounding_error", "exact")
    return {
        "name": name,
        "input": report["inputs"][0]["id"],
        "id": str(grounded),
        "base": report["base"],
        "rank_rule": report["recipe"]["rank"],
        "rank": totals["rank"],
        **{key: totals[key] for key in kept},
        "worst_module": report["worst_module"],
    }


def extraction_certificate(
    recipe: Recipe,
    models: Sequence[tuple[Digest, BaseManifest]],
    modules: Sequence[ModuleReport],
    left_out: Sequence[Mapping[str, Any]],
    *,
    rank: int,
) -> dict[str, Any]:
    """`report.json` of an extraction, as of a merge. Totals are over the whole difference: what is left out counts as lost.

    models: base and tuned.  left_out: tensors that changed and are in no module.
    """
    return {
        "schema": 1,
        "recipe": recipe.to_json(),
        "recipe_digest": str(recipe.digest),
        "paper": Extract.paper,
        "inputs": [_model(digest, manifest) for digest, manifest in models],
        "totals": {**_totals(modules, rank, left_out), "left_out": len(left_out)},
        "worst_module": _worst(modules),
        "modules": [asdict(module) for module in modules],
        "left_out": [dict(each) for each in left_out],
    }


def read_report(blobs: BlobStore, artefact: Digest) -> dict[str, Any] | None:
    """The report of a merged adapter or a basis; None for one that was imported, or whose blobs were deleted."""
    if blobs.stat(artefact) is None:
        return None
    with blobs.open(artefact) as stream:
        report = named_parts(stream.read()).get("report.json")
    if report is None or blobs.stat(report.digest) is None:
        return None
    with blobs.open(report.digest) as stream:
        document: dict[str, Any] = json.load(stream)
    return document


def basis_certificate(recipe: Recipe, groups: Sequence[Mapping[str, Any]], tensors: Descriptor) -> dict[str, Any]:
    """`report.json` of a basis. Errors are relative, of whole adapters and of modules; bytes are of factors and codes alone,
    inputs as bf16; the file's own are `file_bytes`."""
    tasks = [task for group in groups for task in group["tasks"]]
    modules = [(name, module) for group in groups for name, module in group["modules"].items()]
    input_bytes = sum(task["input_bytes"] for task in tasks)
    size_bytes = sum(module["size_bytes"] for _, module in modules) or tensors.size_bytes
    errors = [task["relative_error"] for task in tasks]
    return {
        "schema": 1,
        "kind": "basis",
        "recipe": recipe.to_json(),
        "recipe_digest": str(recipe.digest),
        "paper": catalogue.find(recipe.method).paper,
        "totals": {
            "tasks": len(tasks),
            "modules": len({name for name, _ in modules}),
            "input_bytes": input_bytes,
            "size_bytes": size_bytes,
            "file_bytes": tensors.size_bytes,
            "fraction": size_bytes / input_bytes if input_bytes else 0.0,
            "mean_error": sum(errors) / len(errors),
            "max_error": max(errors),
        },
        "tasks": [{key: task[key] for key in _OF_TASKS if key in task} for task in tasks],
        "modules": [
            {"module": name, **{key: module[key] for key in ("codec", "size_bytes", "input_bytes", "errors")}}
            for name, module in modules
        ],
    }


def _input(digest: Digest, manifest: AdapterManifest) -> dict[str, Any]:
    source = f"{manifest.source.kind} {manifest.source.reference}".strip()
    return {"id": str(digest), "source": source, "licence": manifest.licence, "size_bytes": manifest.weights.size_bytes}


def _model(digest: Digest, manifest: BaseManifest) -> dict[str, Any]:
    size_bytes = sum(part.size_bytes for part in manifest.files.values())
    return {"id": str(digest), "source": manifest.source, "licence": None, "size_bytes": size_bytes}


def _totals(modules: Sequence[ModuleReport], rank: int, left_out: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    beside = sum(each["norm"] ** 2 for each in left_out)
    energy = sum(m.norm**2 for m in modules) + beside
    lost = sum((m.norm * m.relative_error) ** 2 for m in modules) + beside
    kept = energy - lost
    # rounding is relative to what was cast, which is the part that was kept
    rounded = sum(m.norm**2 * m.retained_energy * m.rounding_error**2 for m in modules)
    return {
        "modules": len(modules),
        "rank": rank,
        "exact_modules": sum(m.exact for m in modules),
        "exact": all(m.exact for m in modules) and not left_out,
        "relative_error": math.sqrt(lost / energy) if energy else 0.0,
        "retained_energy": kept / energy if energy else 1.0,
        "rounding_error": math.sqrt(rounded / kept) if kept > 0 else 0.0,
    }


def _worst(modules: Sequence[ModuleReport]) -> dict[str, Any]:
    """The module that lost most of itself; one that cancelled to rounding noise has nothing to lose."""
    floor = _NOISE * max(m.norm for m in modules)
    worst = max((m for m in modules if m.norm >= floor), key=lambda m: (m.relative_error, m.rounding_error))
    return {"module": worst.module, "relative_error": worst.relative_error, "rounding_error": worst.rounding_error}
