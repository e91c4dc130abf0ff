"""The model card of a merged adapter: what a Hub page, and a careful reader, need to know about where it came from."""

import json
from collections.abc import Mapping
from typing import Any

import yaml


def model_card(report: Mapping[str, Any], base_model: str) -> str:
    """README.md with the Hub's metadata block. report: the certificate.  Deterministic: no date, no machine."""
    return f"---\n{_metadata(report, base_model)}---\n\n{_body(report, base_model)}"


def reconstruction_card(report: Mapping[str, Any], base_model: str) -> str:
    """The card of an adapter that came out of a basis. report: its certificate."""
    fields = {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "braid", "reconstruction"],
    }
    tasks = "\n".join(f"| {_cell(task)} | {weight:g} |" for task, weight in report["weights"].items())
    return f"""---
{yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)}---

# LoRA adapter from a reversible basis

For `{base_model}`, out of the basis `{report["basis"]}`.

| task | weight |
|---|---|
{tasks}

{_grounded(report)}Lost by the basis: {report["relative_error"]:.4g} of the norm.
Lost by rounding to the stored type: {report["rounding_error"]:.2g}.
"""


def extraction_card(report: Mapping[str, Any], base_model: str) -> str:
    """The card of an adapter that was extracted from a fine-tuned model. report: its certificate."""
    totals = report["totals"]
    base, tuned = report["inputs"]
    fields = {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "braid", "extraction"],
    }
    rows = "\n".join(f"| {_cell(e['tensor'])} | {e['reason']} | {e['norm']:.4g} |" for e in report["left_out"])
    beside = f"\nChanged, but in no module of this adapter:\n\n| tensor | why | norm |\n|---|---|---|\n{rows}\n" if rows else ""
    return f"""---
{yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)}---

# LoRA adapter extracted from a fine-tuned model

For `{base_model}`: the difference of two models, {totals["modules"]} linear layers cut to rank {totals["rank"]} at most.

| model | source | id |
|---|---|---|
| base | {_cell(base["source"])} | `{base["id"]}` |
| tuned | {_cell(tuned["source"])} | `{tuned["id"]}` |

Lost of the whole difference: {totals["relative_error"]:.4g} of its norm. Lost by rounding to the stored type: \
{totals["rounding_error"]:.2g}. `report.json` holds every module.
{beside}
## Recipe `{report["recipe_digest"]}`

```json
{json.dumps(report["recipe"], indent=2, sort_keys=True, ensure_ascii=False)}
```
"""


def _metadata(report: Mapping[str, Any], base_model: str) -> str:
    licences = sorted({item["licence"] for item in report["inputs"] if item["licence"]})
    fields: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "merge", "braid", report["recipe"]["method"]],
    }
    if len(licences) == 1:
        fields["license"] = licences[0]
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)


def _body(report: Mapping[str, Any], base_model: str) -> str:
    recipe, totals = report["recipe"], report["totals"]
    rows = "\n".join(_row(given, used) for given, used in zip(recipe["adapters"], report["inputs"], strict=True))
    whole = totals["exact"] or totals["exact_modules"] == totals["modules"]  # though an input was cut before
    loss = "nothing: it is the exact sum" if whole else f"{totals['relative_error']:.4g} of the norm, by cutting the rank"
    what = "of the deltas" if report.get("extras") else "in the merge"
    return f"""# LoRA adapter merged with {recipe["method"]}

A merge of {len(report["inputs"])} LoRA adapters of `{base_model}` by `{recipe["method"]}` ({report["paper"]}).

| adapter | weight | source | licence | id |
|---|---|---|---|---|
{rows}

{_grounded(report)}{_extras(report)}Lost {what}: {loss}. \
Lost by rounding to the stored type: {totals["rounding_error"]:.2g}.
{totals["modules"]} modules, rank {totals["rank"]}. Worst module: `{report["worst_module"]["module"]}`, relative error \
{report["worst_module"]["relative_error"]:.4g}. `report.json` holds every module.

## Recipe `{report["recipe_digest"]}`

```json
{json.dumps(recipe, indent=2, sort_keys=True, ensure_ascii=False)}
```
"""


def _grounded(report: Mapping[str, Any]) -> str:
    """What was lost before all else, of adapters whose deltas depend on the base model's weights."""
    rows = "\n".join(
        f"| {_cell(each['name'])} | {_cell(each['base'])} | {each['rank']} | {each['relative_error']:.4g} |"
        for each in report.get("grounded", ())
    )
    if not rows:
        return ""
    heading = "Depending on the base model's weights, and so cut to a rank before all else:"
    return f"{heading}\n\n| adapter | base model | rank | lost of its norm |\n|---|---|---|---|\n{rows}\n\n"


def _extras(report: Mapping[str, Any]) -> str:
    """What became of what the adapters hold beside their deltas."""
    extras = report.get("extras")
    if not extras:
        return ""
    parts = [", ".join(f"{f:.4g} x {name}" for name, f in zip(e["from"], e["factors"], strict=True)) for e in extras["tensors"]]
    rows = [f"| {_cell(each['tensor'])} | {_cell(made)} |" for each, made in zip(extras["tensors"], parts, strict=True)]
    for name, own in extras["dropped"].items():
        rows += [f"| {_cell(tensor)} | nothing: that of {_cell(name)} was dropped |" for tensor in own]
    table = "\n".join(("| tensor | made of |", "|---|---|", *rows))
    return f"Beside the deltas, by the policy `{extras['policy']}`:\n\n{table}\n\n"


def _row(given: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    weight = f"{given['weight']:g}" + (" (by module)" if given["weights_by_module"] else "")
    cells = (given["name"], weight, used["source"], used["licence"] or "unknown", f"`{used['id']}`")
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
