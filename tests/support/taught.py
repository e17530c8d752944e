"""A tiny graft that has learnt one answer by heart."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from mmgraft import GraftedModel
from mmgraft.data.chat.labels import supervise
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import load_processor

BOX = "It is at [0.25,0.5,0.75,1.0]."
"""An answer with a box, as shares of the image."""


def teach(run: Path, image: Image.Image, question: str, answer: str) -> None:
    """Train the graft in a folder until its greedy answer to a question is this one."""
    record = GraftFile.read(run)
    model = GraftedModel.from_pretrained(run, dtype=torch.float32)
    processor = load_processor(record, Path(record.base.id), model.vision_tower)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    asked = [{"role": "user", "content": parts}]
    row = supervise(processor, [*asked, {"role": "assistant", "content": answer}])
    inputs = processor.inputs([row], "right")
    inputs["labels"] = torch.tensor([row.labels])
    model.set_trainable([name for name in model.groups() if name != "base"])
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=3e-3)
    for _ in range(400):
        loss = model(**inputs).loss
        if float(loss.detach()) < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = float(loss.detach())
    assert reached < 0.01, f"it did not learn; the loss is {reached:.2f}"
    model.save_pretrained(run)
