"""``mmgraft inspect``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import human_bytes, human_count, note, print_json, stdout, table
from mmgraft.cli.options import JsonFlag, RevisionOption, argument

if TYPE_CHECKING:
    from mmgraft.model.files.summary import GraftSummary, ModelSummary


def inspect(
    model: Annotated[str, argument("An alias, a Hub id, a folder, or a graft.")],
    revision: RevisionOption = None,
    json: JsonFlag = False,
) -> None:
    """Show a model's layers, their sizes and where a graft may go; of a graft, what it adds.

    No weights are loaded: a model is examined from its config, a graft from its headers.
    """
    from mmgraft.model.files.summary import GraftSummary, locate, summarise_graft, summarise_model

    place = locate(model, revision)
    found = summarise_graft(place) if isinstance(place, Path) else summarise_model(place)
    if json:
        print_json(asdict(found))
    elif isinstance(found, GraftSummary):
        _show_graft(found)
    else:
        _show_model(found)


def _show_model(found: "ModelSummary") -> None:
    out = stdout()
    out.print(f"{found.id}: {found.model_class}", markup=False)
    out.print(
        f"{human_count(found.parameters)} parameters, {human_bytes(found.bytes)} in {found.dtype}, "
        f"{len(found.layers)} layers",
        markup=False,
    )
    sizes = (f"{name} {value}" for name, value in found.sizes.items() if value is not None)
    out.print(", ".join(sizes), markup=False)
    rows = [
        [
            layer.index,
            layer.kind,
            layer.attention.removesuffix("_attention"),
            human_count(layer.parameters),
            human_bytes(layer.bytes),
            "yes" if layer.refused is None else f"no: {layer.refused}",
        ]
        for layer in found.layers
    ]
    out.print(table(["layer", "class", "attention", "parameters", "size", "graft"], rows))
    parts = [
        [name, human_count(size)] for name, size in found.parts.items() if size or name != "other"
    ]
    out.print(table(["beside the layers", "parameters"], parts))
    for method, reason in found.refusals.items():
        note(f"{method} cannot be used here: {reason}")


def _shown(settings: Mapping[str, Any], name: str) -> str:
    """Write settings in one line: the name first, the others in brackets."""
    others = ", ".join(f"{key} {value}" for key, value in settings.items() if key != name)
    return f"{settings[name]} ({others})" if others else str(settings[name])


def _show_graft(found: "GraftSummary") -> None:
    out = stdout()
    layer = "" if found.feature_layer is None else f", hidden state {found.feature_layer}"
    rows = [
        ["method", _shown({"method": found.method, **found.config}, "method")],
        ["workflow", found.workflow],
        ["base", f"{found.base} @ {found.base_revision}" if found.base_revision else found.base],
        ["vision tower", found.tower + layer],
        ["projector", _shown(found.projector, "kind")],
    ]
    out.print(table(["graft", found.folder], rows))
    parts = [
        [row.part, row.tensors, human_count(row.parameters), human_bytes(row.bytes)]
        for row in found.parts
    ]
    tensors = sum(row.tensors for row in found.parts)
    parts.append(["together", tensors, human_count(found.parameters), human_bytes(found.bytes)])
    out.print(table(["it adds", "tensors", "parameters", "size"], parts))
    if found.lacks:
        out.print(table(["it does not promise that", "because"], list(found.lacks.items())))
