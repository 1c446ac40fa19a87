"""What the endpoints answer, as plain values that JSON can hold."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from snell_diffusion.app.bases import Base, Bases
from snell_diffusion.app.drafts import Draft
from snell_diffusion.app.estimates import Estimate
from snell_diffusion.app.inspection import (
    Overlap,
    facts,
    layer_facts,
    overlap,
    read,
    size_sentence,
    sizes_of,
)
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.library import Adapter
from snell_diffusion.app.presets import EFFORTS, KINDS
from snell_diffusion.app.progress import sentence, summaries


def base_values(base: Base) -> dict[str, Any]:
    """A base model; its folder or hub id stays on the server."""
    return {
        "id": base.id,
        "label": base.label,
        "family": base.family,
        "resolution": base.resolution,
        "steps": base.steps,
        "guidance": base.guidance,
        "min_side": base.min_side,
        "max_side": base.max_side,
        "multiple": base.multiple,
        "takes_negative": base.takes_negative,
    }


def preset_rows() -> dict[str, Any]:
    """The kinds of subjects and the efforts that `train` takes."""
    kinds = [{"id": kind.id, "label": kind.label, "hint": kind.hint} for kind in KINDS.values()]
    return {"presets": kinds, "efforts": [asdict(effort) for effort in EFFORTS.values()]}


def estimate_rows(found: dict[str, Estimate]) -> dict[str, Any]:
    """Time and memory by effort."""
    return {
        effort: {
            "seconds": known.seconds,
            "memory_bytes": known.memory,
            "basis": known.basis,
            "sentence": known.sentence(),
        }
        for effort, known in found.items()
    }


def draft_values(draft: Draft) -> dict[str, Any]:
    """The photos of a draft by what they were called."""
    photos = [{"name": photo.name, "caption": photo.caption} for photo in draft.stored]
    return {"id": draft.id, "photos": photos, "notes": draft.notes}


def status_values(jobs: Jobs, job: str) -> dict[str, Any]:
    """Where a run is, in figures and as a sentence."""
    status = jobs.status(job)
    return {"id": job, **asdict(status), "running": status.running, "sentence": sentence(status)}


def run_rows(jobs: Jobs) -> list[dict[str, Any]]:
    """One row per run, newest first."""
    rows = []
    for row in summaries(jobs):
        values = asdict(row)
        rows.append({"id": values.pop("job"), "label": jobs.info(row.job)["label"], **values})
    return rows


def adapter_values(adapter: Adapter) -> dict[str, Any]:
    """An adapter of the list."""
    return {
        "id": adapter.id,
        "label": adapter.label,
        "base": adapter.base_id,
        "uploaded": adapter.uploaded,
        "prompt": adapter.prompt,
    }


def inspection_values(adapter: Adapter, bases: Bases) -> dict[str, Any]:
    """What a file is, and each layer with its share, the norm of its update and of its weight."""
    file = read(adapter)
    measured = sizes_of(adapter, bases)
    return {
        "facts": dict(facts(adapter, file, bases)),
        "size": size_sentence(measured),
        "layers": [
            {**asdict(row), "update": size.update, "weight": size.weight, "ratio": size.ratio}
            for row, size in zip(layer_facts(file.header), measured, strict=True)
        ],
    }


def overlap_values(adapters: Iterable[Adapter]) -> dict[str, Any]:
    """How much two adapters will interfere."""
    first, second = adapters
    found: Overlap = overlap(read(first), read(second))
    return {
        "sentence": found.sentence(),
        "interference": found.interference,
        "agreement": found.agreement,
        "cosine": found.cosine,
        "shared": found.shared,
        "layers_of_one_alone": list(found.only),
        "layers": [
            {
                "name": row.name,
                "shared": row.shared,
                "interference": row.interference,
                "cosine": row.cosine,
            }
            for row in found.layers
        ],
    }
