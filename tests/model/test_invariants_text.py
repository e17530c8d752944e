"""Invariant 1: text is the base's own, bit for bit, whatever was grafted and trained."""

from __future__ import annotations

import pytest
import torch

from grafting import (
    CONFIGS,
    batch,
    distance,
    every_architecture,
    every_method,
    every_pair,
    graft_on,
    grafted,
    logits_of,
    own,
    perturb,
    plain,
    rows,
    text_labels,
    text_of,
    together,
    trained_groups,
)
from mmgraft.errors import UsageError

WORDS = ("ttttttttttttt", "tttttttt", "ttttttttttt")


@every_pair
def test_a_text_batch_in_fp32(arch: str, method: str) -> None:
    model, base = grafted(arch, method), plain(arch)
    for side in ("left", "right"):
        inputs = batch(rows(*WORDS), side)
        assert torch.equal(logits_of(model, inputs), logits_of(base, inputs))


@every_architecture
def test_a_text_batch_in_bf16(arch: str) -> None:
    """All methods on one base: each of them would be in the way."""
    made = [
        graft_on(arch, config, dtype=torch.bfloat16, workflow=name.replace("-", "_"))
        for name, config in CONFIGS.items()
    ]
    model = perturb(together(*made))
    base = plain(arch, torch.bfloat16)
    inputs = batch(rows(*WORDS), "left")
    expected = logits_of(base, inputs)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(logits_of(model, inputs, workflow="text"), expected)


@every_pair
def test_a_text_row_beside_rows_with_images(arch: str, method: str) -> None:
    """Against the base with that row alone: GPT-2 counts padding where nobody tells it."""
    model, base = grafted(arch, method), plain(arch)
    mixed = rows("ttiiiitttttt", "ttttttttt", "iiiittiiiittttt", "tttttttttttttt")
    alone = [logits_of(base, text_of(batch([each])))[0] for each in mixed]
    for side in ("left", "right"):
        inputs = batch(mixed, side)
        found = own(logits_of(model, inputs), inputs)
        for text in (1, 3):
            assert distance(found[text], alone[text]) < 1e-5
        # The rows with images do run the graft: the base reads ids where it sees a picture.
        assert distance(found[0], alone[0]) > 1e-2


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "gpt_oss"])
@every_method
def test_generated_text_is_the_bases(arch: str, method: str) -> None:
    model, base = grafted(arch, method), plain(arch)
    inputs = batch(rows(*WORDS), "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "num_beams": 2}
    expected = base.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    kinds = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(model.generate(**inputs, mm_token_type_ids=kinds, **options), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi", "bloom"])
@every_method
def test_text_stays_the_bases_after_training_steps(arch: str, method: str) -> None:
    model, base = graft_on(arch, CONFIGS[method]), plain(arch)
    names = model.set_trainable(trained_groups(method))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(rows("ttiiiittttt", "tttttttt"), "right")
    for _ in range(2):
        model.train()
        model(**inputs, labels=text_labels(inputs)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert changed <= set(names)
    assert not [name for name in names if name.startswith("base.")]
    texts = batch(rows(*WORDS), "left")
    # Still in training mode: the frozen base stays in eval mode there.
    assert torch.equal(logits_of(model, texts), logits_of(base, texts))


@every_method
def test_an_exception_inside_the_forward_leaves_the_base_as_it_was(method: str) -> None:
    model, base = graft_on("llama", CONFIGS[method]), plain("llama")
    inputs = batch(rows("ttiiiittttt"))
    broken = model.base.model.layers[3].mlp.down_proj
    broken.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        logits_of(model, inputs)
    del broken.forward
    texts = batch(rows(*WORDS), "left")
    assert torch.equal(logits_of(model, texts), logits_of(base, texts))
    assert not [m for m in model.base.modules() if "forward" in m.__dict__]
    assert model.base.config._attn_implementation == base.config._attn_implementation


def test_text_only_runs_every_row_as_text() -> None:
    model, base = grafted("llama", "wings"), plain("llama")
    inputs = batch(rows("tttttttt", "ttttttttttt"), "left")
    with model.text_only():
        found = logits_of(model, inputs, workflow="mm")
        with pytest.raises(UsageError, match="runs the text workflow"):
            logits_of(model, batch(rows("ttiiiit")))
    assert torch.equal(found, logits_of(base, inputs))
    assert not torch.equal(logits_of(model, inputs, workflow="mm"), found)
