"""Check that a function uses what it is handed, and is handed what it can take.

Two rules that see a wire that was cut anywhere: a parameter that its function does not read, and
one with a default that no caller sets.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "mmgraft").rglob("*.py"))
CALLERS = [*SOURCES, *sorted((ROOT / "examples").rglob("*.py"))]

Function = ast.FunctionDef | ast.AsyncFunctionDef

GIVEN_BY_OTHERS = {
    "as_decoder.config": "in the place of other methods",
    "_copy.processor": "in the place of score_choices",
    "_handle.frame": "of signal",
    "_handle.number": "of signal",
    "_offers.path": "the key of a cache",
    "of_entry_point.origin": "called as those of other kinds",
    "pass_on.frame": "of signal",
    "read.number": "in the place of other readers",
    "shown.number": "in the place of other readers",
}
"""Parameters of functions that are called as others are, and why they are not read."""

FOR_USERS = {
    "BadRowLog.new",
    "Collator.workflow",
    "FeatureCache.max_bytes",
    "FeatureCache.shard_bytes",
    "Graft.parts",
    "GraftedCore.anatomy",
    "GraftedCore.workflows",
    "add_workflow.revision",
    "add_workflow.verify",
    "blind_score.name",
    "check_images.most",
    "format_boxes.phrase",
    "get_many.batch_size",
    "load_processor.options",
    "named.count",
    "processor.workflow",
    "prompt.tools",
    "prompt.where",
    "question_rows.turns",
    "quick.hub",
    "read_rows.limit",
    "quick.seed",
    "read_rows.check_images",
    "read_rows.format",
    "register_tower.describe",
    "run_demo.models",
    "write_shards.max_bytes",
    *(f"graft.{name}" for name in ("device_map", "dtype", "projector", "quantization")),
    *(f"graft.{name}" for name in ("template", "tokenizer", "workflow")),
    *(f"save_pretrained.{name}" for name in ("max_shard_size", "workflow")),
    *(f"score_choices.{name}" for name in ("batch_size", "on_result", "progress")),
    *(f"score_texts.{name}" for name in ("batch_size", "on_result", "progress")),
    *(f"import_checkpoint.{name}" for name in ("base", "dry_run", "force", "layers")),
    *(f"import_checkpoint.{name}" for name in ("revision", "say", "tower")),
}
"""Parameters that nothing in mmgraft sets by their name: users and tests do, or another library, or
a `partial` that is called later."""


OF_BASE_CLASSES = {
    "_build_generation_config.use_cb",
    "get_gen_models.cache_dir",
    "get_manager.use_cb",
    "get_model_modality.processor",
    "_get_train_sampler.train_dataset",
    "_load_from_checkpoint.model",
    "_model_call.attn_mask",
    "_model_call.labels",
    "_save_checkpoint.trial",
    "autocast_smart_context_manager.cache_enabled",
    "compute_loss.num_items_in_batch",
    "compute_loss.return_outputs",
    "create_optimizer.model",
    "find_spec.target",
    "on_finalized_text.stream_end",
    "on_log.logs",
    "post_process_image_text_to_text.skip_special_tokens",
    "tok_batch_multimodal_encode.left_truncate_len",
    "tok_batch_multimodal_encode.padding_side",
    "tok_batch_multimodal_encode.truncation",
}
"""Parameters that transformers, lm-evaluation-harness and Python's imports set."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function, with the class whose method it is."""
    owners = {
        inner: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for inner in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node, owners.get(node)


def unread(tree: ast.Module) -> Iterator[str]:
    """Parameters that their function does not read; methods may have what a base class wants."""
    for node, owner in functions(tree):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if not body or (owner is not None and owner.bases):
            continue
        names = {one.id for part in body for one in ast.walk(part) if isinstance(one, ast.Name)}
        refuses = len(body) == 1 and isinstance(body[0], ast.Raise | ast.Expr)
        if refuses or "locals" in names:
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for one in given:
            if one.arg not in names and one.arg not in ("self", "cls") and one.arg[0] != "_":
                yield f"{node.name}.{one.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_parameter_is_read(path: Path) -> None:
    found = set(unread(parsed(path))) - GIVEN_BY_OTHERS.keys()
    assert not found, "a parameter that nothing is done with"


def calls() -> dict[str, list[tuple[int, set[str | None]]]]:
    """Every call by the function's name: how many arguments by place, and the names of the others.

    The functions that others are given as (``partial``) count as called.
    """
    found: dict[str, list[tuple[int, set[str | None]]]] = defaultdict(list)
    for path in CALLERS:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            starred = any(isinstance(one, ast.Starred) for one in node.args)
            places, names = 99 if starred else len(node.args), {one.arg for one in node.keywords}
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "partial" and node.args:
                inner = node.args[0]
                name, places = getattr(inner, "id", getattr(inner, "attr", "")), places - 1
            found[name].append((places, names))
    return found


def unset(tree: ast.Module, called: dict[str, list[tuple[int, set[str | None]]]]) -> Iterator[str]:
    """Parameters with a default that no call sets."""
    for node, owner in functions(tree):
        made = owner is not None and node.name == "__init__"
        if node.name[:2] == "__" and not made:
            continue
        name = owner.name if owner is not None and made else node.name
        static = any(getattr(one, "id", "") == "staticmethod" for one in node.decorator_list)
        bound = int(owner is not None and not static)
        places = [*node.args.posonlyargs, *node.args.args]
        first = len(places) - len(node.args.defaults)
        for at, one in enumerate(places[first:], start=first):
            if not any(
                one.arg in names or None in names or count > at - bound
                for count, names in called[name]
            ):
                yield f"{name}.{one.arg}"
        for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if default is not None and not any(
                one.arg in names or None in names for _, names in called[name]
            ):
                yield f"{name}.{one.arg}"


def test_every_default_is_set_somewhere() -> None:
    """Find defaults that no call sets, but those of commands and of what another library calls."""
    called, found = calls(), set()
    for path in SOURCES:
        if path.parent.name != "cli":
            found |= set(unset(parsed(path), called))
    left = sorted(found - FOR_USERS - OF_BASE_CLASSES)
    assert left == [], "no caller sets it: was a wire cut?"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("def f(a, b): return a", {"f.b"}),
        ("def f(a, _b): return a", set()),
        ("class A:\n    def f(self, a): return 1", {"f.a"}),
        ("class A(B):\n    def f(self, a): return 1", set()),
        ("def f(a):\n    'Say.'\n    raise E", set()),
    ],
)
def test_what_is_not_read_is_found(text: str, wanted: set[str]) -> None:
    assert set(unread(ast.parse(text))) == wanted


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ((0, set()), {"f.b", "f.c"}),
        ((2, set()), {"f.c"}),
        ((0, {"c"}), {"f.b"}),
        ((0, {None}), set()),
    ],
)
def test_what_nobody_sets_is_found(call: tuple[int, set[str | None]], wanted: set[str]) -> None:
    tree = ast.parse("def f(a, b=1, *, c=2): return a")
    assert set(unset(tree, defaultdict(list, f=[call]))) == wanted
