"""Images in poses: the maths of a pose, draws that depend on nothing but a number, loaders, presets, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets

from lightning_methods import Classifier, PoseDataModule
from lightning_methods.data._warping import AFFNIST, Affine, PoseRange, draw, level, on_canvas, uniform, warp
from lightning_methods.errors import InvalidArgument
from lightning_methods.models import MLP
from tests.support.datasets import write_cifar10, write_mnist

NUMBERS = np.arange(500)


def image(side: int = 9) -> torch.Tensor:
    return torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)) + 0.1


def moved(poses: PoseRange, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return warp(x, draw(poses, seed, np.arange(len(x)), x))


# --- one pose


def test_no_pose_changes_nothing() -> None:
    assert torch.equal(moved(PoseRange(), image()), image())


def test_quarter_turns_are_counter_clockwise_and_exact() -> None:
    for quarter in (1, 2, 3):
        turned = moved(PoseRange(rotation=(90 * quarter, 90 * quarter)), image())
        assert torch.allclose(turned, image().rot90(quarter, (2, 3)), atol=1e-5)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (-2, 3)])
def test_whole_shifts_are_exact(shift) -> None:
    x, padded = image(), F.pad(image(), (3, 3, 3, 3))
    expected = padded[:, :, 3 - shift[1] : 12 - shift[1], 3 - shift[0] : 12 - shift[0]]
    affine = Affine(np.eye(2)[None], np.array([shift], dtype=float))
    assert torch.equal(warp(x, affine), expected)


def test_scale_and_shear_move_a_line_where_they_should() -> None:
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, :, 14] = 1.0  # 4 to the right of the middle
    larger = moved(PoseRange(scale=(1.5, 1.5)), x)[0, 0]
    assert larger[10].argmax() == 16
    leaning = moved(PoseRange(shear=(0.5, 0.5)), x)[0, 0]
    assert leaning[10].argmax() == 14
    assert leaning[14].argmax() == 16  # 4 down, 2 to the right
    assert leaning[6].argmax() == 12


def test_against_torchs_own_grid() -> None:
    x = torch.rand(4, 2, 12, 10, generator=torch.Generator().manual_seed(0))
    poses = PoseRange(rotation=(-80, 80), scale=(0.6, 1.5), shear=(-0.3, 0.3), independent=True, shift=2)
    affine = draw(poses, 3, np.arange(4), x)
    half = np.array([5.0, 6.0])
    inverse = np.linalg.inv(affine.matrix)
    matrix = inverse * half[None, None] / half[None, :, None]
    offset = -(inverse @ affine.shift[:, :, None])[:, :, 0] / half
    theta = torch.from_numpy(np.concatenate([matrix, offset[:, :, None]], 2)).float()
    expected = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    assert torch.allclose(warp(x, affine), expected, atol=1e-4)


# --- draws


def test_draws_are_uniform_and_streams_and_seeds_differ() -> None:
    numbers = np.arange(20_000)
    a, b, c = uniform(0, numbers, 0), uniform(0, numbers, 1), uniform(1, numbers, 0)
    for values in (a, b, c):
        counts = np.histogram(values, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi squared of 19 degrees, one in a thousand
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.03


def test_draws_stay_in_their_ranges() -> None:
    x = torch.zeros(500, 1, 9, 9)
    poses = PoseRange(rotation=(-30, 60), shift=3, scale=(0.5, 2.0), shear=(-0.2, 0.1))
    matrix, shift = draw(poses, 0, NUMBERS, x)
    angle = np.rad2deg(np.arctan2(-matrix[:, 1, 0], matrix[:, 0, 0]))
    size = np.hypot(matrix[:, 0, 0], matrix[:, 1, 0])
    assert (angle.min(), angle.max()) == pytest.approx((-30, 60), abs=2)
    assert (size.min(), size.max()) == pytest.approx((0.5, 2.0), abs=0.05)
    assert set(shift.ravel()) == set(range(-3, 4))
    assert np.allclose(np.linalg.det(matrix), size**2)
    distance = draw(PoseRange(distance=5.0), 0, NUMBERS, x).shift
    assert np.abs(np.hypot(*distance.T) - 5).max() < 0.75
    assert abs(distance.mean()) < 0.5


def test_inside_uses_all_the_room_and_no_more() -> None:
    x = torch.zeros(500, 1, 20, 20)
    x[:, :, 8:13, 9:11] = 1.0
    out = moved(PoseRange(inside=True), x)
    assert out.flatten(1).sum(1).min() > 9.9  # the whole figure, at places between pixels
    at = out[:, 0].sum(0)
    assert all((side > 0).any() for side in (at[0], at[-1], at[:, 0], at[:, -1]))
    affine = draw(AFFNIST, 0, NUMBERS, x)
    corners = np.array([[-0.5, 0.5, -0.5, 0.5], [-1.5, -1.5, 2.5, 2.5]])  # centres of the corner pixels
    reached = affine.matrix @ corners + affine.shift[:, :, None]
    assert np.abs(reached).max() <= 9.5 + 1e-9
    assert np.isfinite(draw(AFFNIST, 0, NUMBERS, torch.zeros(500, 1, 20, 20)).shift).all()
    full = draw(AFFNIST, 0, NUMBERS, torch.ones(500, 1, 20, 20))  # does not fit: in the middle
    assert np.isfinite(full.shift).all()


def test_canvas() -> None:
    assert torch.equal(on_canvas(image(), 12)[:, :, 1:10, 1:10], image())
    assert on_canvas(image(), 12).shape == (1, 1, 12, 12)
    assert on_canvas(image(), None) is not None


# --- the module


def digits(**settings: object) -> PoseDataModule:
    data = PoseDataModule("digits", **{"train_size": 60, "test_size": 20, "batch_size": 16, **settings})
    data.setup()
    return data


def test_parts_shapes_and_levels() -> None:
    data = digits(test_rotations=(0, -45), test_translations=(2,), test_scales=(0.5,), test_shears=(0.2,), canvas=12)
    names = ["rotation_0", "rotation_-45", "translation_2", "scale_0.5", "shear_0.2"]
    assert [one.name for one in data.levels] == names
    assert (data.shape, data.num_classes) == ((1, 12, 12), 10)
    loaders = data.test_dataloader()
    assert len(loaders) == 5
    batches = [next(iter(loader)) for loader in loaders]
    for x, y in batches:
        assert x.shape == (16, 1, 12, 12)
        assert torch.equal(y, batches[0][1])  # the same images in the same order at all levels
        assert x.min() >= 0
        assert x.max() <= 1
    assert len(data.train_dataset) == 60
    assert torch.bincount(data.train_dataset.targets).tolist() == [6] * 10
    turned = warp(batches[0][0], draw(data.levels[1].poses, 0, np.arange(16), batches[0][0]))
    assert torch.allclose(batches[1][0], turned, atol=1e-6)


def test_default_levels_and_ranges() -> None:
    assert [one.value for one in PoseDataModule().levels] == list(range(-90, 91, 15))
    assert PoseDataModule().train_poses.rotation == (-30, 30)
    assert [one.name for one in PoseDataModule(test_scales=(0.5, 1.5)).levels] == ["scale_0.5", "scale_1.5"]


def seen(data: PoseDataModule, epochs: int = 2) -> list[torch.Tensor]:
    """Return what training gets, one tensor an epoch."""
    found: list[list[torch.Tensor]] = [[] for _ in range(epochs)]

    class Recorder(Classifier):
        def training_step(self, batch, batch_idx):
            found[self.current_epoch].append(batch[0])
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Recorder(torch.nn.Sequential(torch.nn.Flatten(), MLP(64, (8,))))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet).fit(model, data)
    return [torch.cat(x) for x in found]


def test_poses_do_not_depend_on_workers_and_change_by_epoch() -> None:
    alone = seen(digits())
    assert not torch.equal(alone[0], alone[1])
    many = seen(digits(num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))


def test_ranks_share_the_images_of_an_epoch() -> None:
    data = digits()
    sampler = data.train_dataloader().sampler
    ranks = [DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank, shuffle=False) for rank in range(2)]
    drawn = [list(rank) for rank in ranks]
    assert sorted(drawn[0] + drawn[1]) == list(range(60))
    assert drawn[0] != sorted(drawn[0])


def test_seeds_and_parts_have_other_poses_and_one_seed_the_same() -> None:
    first, again, other = (digits(seed=seed).val_dataset[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    data = digits(test_rotations=(0,))
    single = torch.stack([data.test_datasets[0][i][0] for i in range(20)])
    assert torch.equal(single, next(iter(digits(test_rotations=(0,), batch_size=20).test_dataloader()[0]))[0])
    with pytest.raises(IndexError):
        data.test_datasets[0][20]
    assert len(list(data.test_datasets[0])) == 20


def test_affnist_preset(tmp_path: Path) -> None:
    data = PoseDataModule("mnist", str(write_mnist(tmp_path)), preset="affnist", train_size=30)
    data.setup()
    assert data.shape == (1, 40, 40)
    assert [one.name for one in data.levels] == ["trained", "affnist"]
    assert data.levels[1].poses == AFFNIST
    x, _ = next(iter(data.test_dataloader()[1]))
    assert x.shape == (30, 1, 40, 40)


def test_cifar_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    cifar = PoseDataModule("cifar10", str(tmp_path), test_rotations=(0, 90), val_fraction=0)
    cifar.setup()
    assert cifar.val_dataloader() == []
    upright, turned = (next(iter(loader))[0] for loader in cifar.test_dataloader())
    raw = torch.from_numpy(datasets.CIFAR10(str(tmp_path), train=False).data).permute(0, 3, 1, 2) / 255
    assert torch.allclose(upright, raw, atol=1e-6)
    assert torch.allclose(turned, raw.rot90(1, (2, 3)), atol=1e-5)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (20, 30), (i, 20 * i, 100)).save(tmp_path / part / name / f"{i}.png")
    folder = PoseDataModule("image_folder", str(tmp_path), image_size=16, canvas=20)
    folder.setup()
    assert (folder.shape, folder.num_classes) == ((3, 20, 20), 2)
    assert next(iter(folder.train_dataloader()))[0].shape == (18, 3, 20, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "norb"}, "dataset='norb'"),
        ({"preset": "norb"}, "preset='norb'"),
        ({"preset": "affnist", "test_scales": (1.0,)}, "test_scales are given too"),
        ({"train_rotation": (30, -30)}, "the lower one first"),
        ({"train_rotation": (0, float("nan"))}, "finite"),
        ({"train_rotation": 30}, "train_rotation=30"),
        ({"train_scale": (0.0, 1.0)}, "positive sizes"),
        ({"train_translation": -1}, "train_translation=-1"),
        ({"test_rotations": ()}, "at least one"),
        ({"test_rotations": (0, 0)}, "each once"),
        ({"test_rotations": (0, float("inf"))}, "finite"),
        ({"test_scales": (0.0,)}, "must be positive"),
        ({"canvas": 20}, "canvas=20 is smaller"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"test_size": 0}, "test_size=0"),
        ({"dataset": "digits", "train_size": 0}, "train_size=0"),
    ],
)
def test_refuses(settings, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        PoseDataModule(**settings)


def test_more_images_than_there_are_and_no_setup() -> None:
    with pytest.raises(InvalidArgument, match="test_size=400: there are 359"):
        PoseDataModule("digits", test_size=400).setup("test")
    with pytest.raises(InvalidArgument, match="train_size=5000"):
        PoseDataModule("digits", train_size=5000).setup("fit")
    for loader in ("train", "val", "test"):
        with pytest.raises(InvalidArgument, match="not set up"):
            getattr(PoseDataModule("digits"), f"{loader}_dataloader")()


def test_level_names_are_short() -> None:
    assert level("scale", 0.75).name == "scale_0.75"
