"""Plans: positions known from a size alone, and projectors held to slow references."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from pydantic import BaseModel
from torch import Tensor

from mmgraft.data.images import open_image, size_of
from mmgraft.errors import UsageError
from mmgraft.vision.feature_cache import FeatureCache, TowerFeatures
from mmgraft.vision.images import BadImage
from mmgraft.vision.plan import ImagePositions, Plan, View
from mmgraft.vision.projectors.configs import (
    LinearConfig,
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    PoolConfig,
    ProjectorConfig,
    QFormerConfig,
)
from mmgraft.vision.projectors.registry import (
    AnyProjector,
    ProjectorKind,
    build_projector,
    find_projector,
    projectors,
    register_projector,
    unregister_projector,
)
from sized_tower import plan, sized_tower
from tiny_towers import picture

CONFIGS = [
    MlpConfig(),
    LinearConfig(),
    PixelShuffleConfig(),
    PixelShuffleConfig(k=3),
    PoolConfig(),
    PoolConfig(k=4, norm=True),
    PerceiverConfig(latents=5, layers=2, heads=3, head_dim=2),
    PerceiverConfig(form="idefics2", latents=2, layers=1, heads=4, kv_heads=2, head_dim=3),
    PerceiverConfig(latents=3, layers=1, heads=1, per="view"),
    QFormerConfig(queries=4, width=8, layers=2, heads=2, hidden=9, per="image"),
]
ids = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}{getattr(c, 'k', '')}")
WIDTH, HIDDEN = 6, 10


def sizes() -> list[tuple[int, int]]:
    draw = random.Random(0)
    found = [(draw.randint(1, 300), draw.randint(1, 300)) for _ in range(200)]
    return [*found, (1, 4000), (4000, 1), (1, 1)]


@ids
def test_counts_of_a_plan_are_the_vectors_that_come_out(config: ProjectorConfig) -> None:
    projector = build_projector(config, WIDTH, HIDDEN)
    positions = ImagePositions(config.counts, plan)
    plans = [plan(size) for size in sizes()]
    for one in set(plans):
        made = projector(torch.randn(one.entries, WIDTH), [one])
        assert made.shape == (projector.counts(one), HIDDEN)
    assert [positions(size) for size in sizes()] == [projector.counts(one) for one in plans]
    together = projector(torch.randn(sum(one.entries for one in plans), WIDTH), plans)
    assert len(together) == sum(map(positions, sizes()))


def test_the_vectors_of_a_tower_are_those_of_its_plan() -> None:
    tower = sized_tower()
    for width, height in [(1, 4000), (4000, 1), *sizes()[:20]]:
        image = Image.new("RGB", (width, height), (9, 90, 200))
        features = tower.encode(tower.preprocess([image]), [tower.plan(image.size)])
        assert len(features) == tower.entries(tower.plan(image.size))


@ids
def test_an_image_does_not_depend_on_its_neighbours(config: ProjectorConfig) -> None:
    # In double precision: products of other shapes round in another order.
    tower = sized_tower(WIDTH).double()
    projector = build_projector(config, WIDTH, HIDDEN).double()
    images = [picture(*size, which=n % 2) for n, size in enumerate([(40, 24), (9, 60), (24, 40)])]
    plans = [tower.plan(image.size) for image in images]

    def vectors(chosen: list[int]) -> Tensor:
        pixels = tower.preprocess([images[n] for n in chosen])
        some = [plans[n] for n in chosen]
        return projector(tower.encode(pixels, some), some)

    together = vectors([0, 1, 2]).split([projector.counts(one) for one in plans])
    for number, piece in enumerate(together):
        torch.testing.assert_close(piece, vectors([number]), atol=1e-6, rtol=1e-5)


# -- references ---------------------------------------------------------------------------------


def blocks(features: Tensor, one: Plan, k: int) -> list[list[Tensor | None]]:
    """The vectors of every block, row by row; None where a block reaches over the edge."""
    found: list[list[Tensor | None]] = []
    start = 0
    for view in one.views:
        rows, columns = view.grid
        for top in range(0, rows, k):
            for left in range(0, columns, k):
                block: list[Tensor | None] = []
                for row in range(top, top + k):
                    for column in range(left, left + k):
                        there = row < rows and column < columns
                        block.append(features[start + row * columns + column] if there else None)
                found.append(block)
        start += rows * columns
    return found


PLAN = Plan((View("base", (5, 3)), View("tile", (4, 4)), View("thumbnail", (1, 1))))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pixel_shuffle_puts_a_block_side_by_side(k: int) -> None:
    features = torch.randn(PLAN.entries, WIDTH)
    projector: Any = build_projector(PixelShuffleConfig(k=k), WIDTH, HIDDEN)
    zeros = torch.zeros(WIDTH)
    wanted = [
        torch.cat([zeros if one is None else one for one in block])
        for block in blocks(features, PLAN, k)
    ]
    assert torch.equal(projector.compress(features, [PLAN]), torch.stack(wanted))
    x = torch.stack(wanted)
    x = (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(projector(features, [PLAN]), projector.mlp(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pool_takes_the_mean_of_a_block(k: int) -> None:
    features = torch.randn(PLAN.entries, WIDTH)
    projector: Any = build_projector(PoolConfig(k=k), WIDTH, HIDDEN)
    wanted = [
        torch.stack([one for one in block if one is not None]).mean(0)
        for block in blocks(features, PLAN, k)
    ]
    got = projector.compress(features, [PLAN])
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-6, rtol=1e-5)


def test_linear_is_one_layer() -> None:
    projector: Any = build_projector(LinearConfig(init_scale=0.5), WIDTH, HIDDEN)
    x = torch.randn(4, WIDTH)
    wanted = x @ projector.linear.weight.T + projector.linear.bias
    torch.testing.assert_close(projector(x, [Plan.of_count(4)]), wanted)
    assert list(projector.state_dict()) == ["linear.weight", "linear.bias"]


# -- settings -----------------------------------------------------------------------------------


class Holder(BaseModel):
    projector: AnyProjector = MlpConfig()


def test_settings_name_their_projector_and_without_a_kind_mean_mlp() -> None:
    old = {"norm": True, "hidden": None, "init_scale": 0.5}
    assert Holder(projector=old).projector == MlpConfig(norm=True, init_scale=0.5)
    assert Holder(projector=old).model_dump()["projector"] == old
    for config in CONFIGS:
        again = Holder.model_validate(Holder(projector=config).model_dump(mode="json"))
        assert again.projector == config
    assert Holder(projector={"kind": "pool", "k": 4}).projector == PoolConfig(k=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "pixel_shufle"}, "pixel_shuffle"),
        ({"kind": "pool", "norn": True}, "norm"),
        ({"kind": "pool", "k": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Holder(projector=settings)


def test_a_projector_of_another_package() -> None:
    class HalfConfig(ProjectorConfig):
        kind: str = "half"

        def counts(self, plan: Plan) -> int:
            return 2  # whatever the tower gives

    class Half(find_projector("linear").load()):
        def forward(self, features: Tensor, plans: Any) -> Tensor:
            return self.linear(features[: 2 * len(plans)])

    kind = ProjectorKind("half", "two vectors", HalfConfig, lambda: Half)
    register_projector(kind)
    try:
        assert "half" in projectors()
        assert Holder(projector={"kind": "half"}).projector == HalfConfig()
        with pytest.raises(UsageError, match="already registered"):
            register_projector(kind)
    finally:
        unregister_projector("half")
    with pytest.raises(UsageError, match="unknown projector 'half'"):
        find_projector("half")


# -- sizes and features of files ----------------------------------------------------------------


def png(image: Image.Image, late_exif: bytes | None = None) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    data = out.getvalue()
    if late_exif is None:
        return data
    body = b"eXIf" + late_exif
    chunk = struct.pack(">I", len(late_exif)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:-12] + chunk + data[-12:]


def test_a_size_is_that_of_the_opened_image(tmp_path: Path) -> None:
    image = picture(30, 20)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "turned.jpg", exif=turned)
    image.save(tmp_path / "turned.png", exif=turned)
    image.save(tmp_path / "turned.webp", exif=turned)
    image.save(tmp_path / "turned.tiff", exif=turned)
    image.save(tmp_path / "plain.gif")
    (tmp_path / "plain.png").write_bytes(png(image))
    (tmp_path / "late.png").write_bytes(png(image, turned.tobytes()))
    found = {path.name: size_of(str(path), "row 1") for path in sorted(tmp_path.iterdir())}
    assert found == {name: open_image(str(tmp_path / name), "x").size for name in found}
    assert found["late.png"] == found["turned.jpg"] == (20, 30)
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    assert size_of(uri, "row 1") == size_of(image, "row 1") == (30, 20)
    with pytest.raises(BadImage, match=r"row 1: .*not found"):
        size_of(str(tmp_path / "none.png"), "row 1")


def test_no_pixel_is_read_for_a_size(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "plain.png").write_bytes(png(picture(30, 20)))
    picture(30, 20).save(tmp_path / "plain.jpg")

    def fail(*_: Any) -> None:
        raise AssertionError("pixels were read")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    monkeypatch.setattr(Image.Image, "load", fail)
    assert size_of(str(tmp_path / "plain.png"), "row 1") == (30, 20)
    assert size_of(str(tmp_path / "plain.jpg"), "row 1") == (30, 20)


def test_cached_features_are_the_computed_ones(tmp_path: Path) -> None:
    tower = sized_tower()
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, size in zip(paths, [(40, 24), (9, 60), (8, 8)], strict=True):
        picture(*size).save(path)
    compute = TowerFeatures(tower)
    cache = FeatureCache(tmp_path / "cache", tower.fingerprint())
    cache.get_many(paths, compute)
    fresh = FeatureCache(tmp_path / "cache", tower.fingerprint())
    found = fresh.get_many(paths, lambda _: pytest.fail("was stored"))
    assert len({len(one) for one in found}) == 3
    for one, other in zip(found, compute(paths), strict=True):
        assert torch.equal(one, other)
