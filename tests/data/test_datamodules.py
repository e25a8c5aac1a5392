"""The DataModules: splits, statistics, files, loaders, the command line, and refusals."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

import lightning_methods.data as data
from lightning_methods.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    ImbalancedSubset,
    MNISTDataModule,
    NoisyLabels,
    find_labels,
)
from lightning_methods.data.images import ImageTensors, Preprocess, TensorBatch
from lightning_methods.errors import InvalidArgument, MissingDependency
from lightning_methods.models import Classifier
from tests.support.datasets import write_cifar10, write_mnist

# the runner's own arguments, and no `seed_everything` in the YAML
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]


def everything(loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def rows(dataset: Any) -> set[bytes]:
    return {x.numpy().tobytes() for x, _ in dataset}


# --- digits


def test_digits_counts_shapes_and_order() -> None:
    digits = DigitsDataModule()
    assert (digits.shape, digits.num_classes) == ((1, 8, 8), 10)
    digits.setup()
    assert [len(d) for d in (digits.train_dataset, digits.val_dataset, digits.test_dataset)] == [1258, 180, 359]
    x, y = everything(digits.train_dataloader())
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1258, 1, 8, 8), torch.float32, (1258,), torch.int64)
    assert len(digits.train_dataloader()) == 20
    again = everything(digits.val_dataloader())[1]
    assert torch.equal(again, digits.val_dataset.targets)
    assert not torch.equal(y, digits.train_dataset.targets)
    assert torch.equal(everything(digits.predict_dataloader())[1], digits.test_dataset.targets)


def test_digits_split_is_stratified_disjoint_and_complete() -> None:
    digits = DigitsDataModule()
    digits.setup()
    parts = [digits.train_dataset, digits.val_dataset, digits.test_dataset]
    total = sum(torch.bincount(p.targets) for p in parts)
    for part in parts:
        assert ((torch.bincount(part.targets) - total * len(part) / 1797).abs() <= 1.5).all()
    images = [rows(p) for p in parts]
    assert sum(map(len, images)) == len(set().union(*images)) == 1797


def test_digits_are_standardised_with_the_training_part_alone() -> None:
    digits = DigitsDataModule(batch_size=2000)
    digits.setup()
    x, _ = next(iter(digits.train_dataloader()))
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std(correction=0)) - 1) < 1e-5
    test, _ = next(iter(digits.test_dataloader()))
    assert 1e-5 < abs(float(test.mean())) < 0.1


def test_digits_flat_holds_the_same_numbers() -> None:
    image, flat = DigitsDataModule(), DigitsDataModule(flat=True)
    assert flat.shape == (64,)
    for dm in (image, flat):
        dm.setup("test")
    assert torch.equal(image.test_dataset[3][0].flatten(), flat.test_dataset[3][0])


def test_the_split_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    splits = []
    for seed in (0, 0, 1):
        digits = DigitsDataModule(seed=seed)
        digits.setup()
        splits.append(rows(digits.test_dataset))
    assert torch.equal(torch.get_rng_state(), before)
    assert splits[0] == splits[1] != splits[2]


def test_setup_builds_what_a_stage_needs_once() -> None:
    digits = DigitsDataModule()
    digits.prepare_data()
    digits.setup("test")
    assert digits.train_dataset is None
    test = digits.test_dataset
    digits.setup("validate")
    assert digits.train_dataset is None
    digits.setup("fit")
    train = digits.train_dataset
    digits.setup("fit")
    digits.setup(None)
    assert digits.train_dataset is train
    assert digits.test_dataset is test


def test_no_validation_part() -> None:
    digits = DigitsDataModule(val_fraction=0)
    digits.setup("fit")
    assert digits.val_dataloader() == []
    assert len(digits.train_dataset) == 1438


def test_workers_hand_out_the_same_batches() -> None:
    digits, workers = DigitsDataModule(batch_size=100), DigitsDataModule(batch_size=100, num_workers=1)
    for dm in (digits, workers):
        dm.setup("test")
    a, b = everything(digits.test_dataloader()), everything(workers.test_dataloader())
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, r"batch_size=2\.5"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0"),
        ({"test_fraction": -0.1}, r"test_fraction=-0\.1"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "nothing to train on"),
    ],
)
def test_digits_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        DigitsDataModule(**arguments)


def test_loaders_before_setup_say_what_to_call() -> None:
    digits = DigitsDataModule()
    for make in (digits.train_dataloader, digits.val_dataloader, digits.test_dataloader):
        with pytest.raises(InvalidArgument, match="Call setup"):
            make()


# --- packages that are needed where they are used


def test_optional_packages_are_imported_inside_functions_only() -> None:
    for file in Path(data.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            assert not any(n.split(".")[0] in {"sklearn", "torchvision", "PIL"} for n in names), file


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingDependency, match=r"lightning-methods\[digits\]"):
        DigitsDataModule().setup()
    with pytest.raises(MissingDependency, match=r"lightning-methods\[vision\]"):
        MNISTDataModule(str(tmp_path)).setup()


# --- MNIST


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def test_mnist_parts_and_published_statistics(mnist_root: Path) -> None:
    mnist = MNISTDataModule(str(mnist_root), batch_size=50)
    assert mnist.shape == (1, 28, 28)
    mnist.setup()
    assert [len(d) for d in (mnist.train_dataset, mnist.val_dataset, mnist.test_dataset)] == [180, 20, 30]
    assert torch.bincount(mnist.val_dataset.targets).tolist() == [2] * 10
    assert not rows(mnist.train_dataset) & rows(mnist.val_dataset)
    raw = datasets.MNIST(str(mnist_root), train=False).data.float() / 255
    x, _ = everything(mnist.test_dataloader())
    assert torch.allclose(x[:, 0], (raw - 0.1307) / 0.3081, atol=1e-5)


def test_in_memory_and_item_by_item_are_the_same(mnist_root: Path) -> None:
    both = [MNISTDataModule(str(mnist_root), in_memory=m, flat=True, train_size=60) for m in (True, False)]
    for dm in both:
        dm.setup("fit")
        assert torch.bincount(find_labels(dm.train_dataset)).tolist() == [6] * 10
    a, b = (torch.stack([x for x, _ in dm.train_dataset]) for dm in both)
    assert a.shape == (60, 784)
    assert torch.equal(a, b)


def test_device_keeps_the_batches_there(mnist_root: Path) -> None:
    # the meta device holds no numbers: it shows that nothing is moved back
    mnist = MNISTDataModule(str(mnist_root), device="meta")
    mnist.setup("fit")
    x, y = next(iter(mnist.train_dataloader()))
    assert x.device.type == y.device.type == "meta"
    assert mnist.train_dataset.targets.device.type == "cpu"


def test_absent_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    for dm, folder in ((MNISTDataModule(str(tmp_path)), "MNIST/raw"), (CIFAR10DataModule(str(tmp_path)), "cifar-10")):
        dm.prepare_data()
        with pytest.raises(InvalidArgument, match=rf"{folder}.*download=True"):
            dm.setup("fit")


def test_download_is_asked_for_once_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, train, download: asked.append((root, train, download)))
    MNISTDataModule("somewhere", download=True).prepare_data()
    assert asked == [("somewhere", True, True), ("somewhere", False, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 0}, "train_size=0"),
        ({"in_memory": False, "device": "cpu"}, "in_memory=True"),
        ({"device": "cpu", "num_workers": 1}, "num_workers=0"),
    ],
)
def test_mnist_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        MNISTDataModule(**arguments)


def test_train_size_beyond_what_is_left(mnist_root: Path) -> None:
    with pytest.raises(InvalidArgument, match="180 images are left"):
        MNISTDataModule(str(mnist_root), train_size=181).setup("fit")


# --- CIFAR-10


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar10(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return tmp_path


def test_cifar10_both_ways(cifar_root: Path) -> None:
    both = [CIFAR10DataModule(str(cifar_root), in_memory=m) for m in (True, False)]
    for dm in both:
        dm.setup()
        assert [len(d) for d in (dm.train_dataset, dm.val_dataset, dm.test_dataset)] == [90, 10, 20]
    a, b = (torch.stack([x for x, _ in dm.test_dataset]) for dm in both)
    assert a.shape == (20, 3, 32, 32)
    assert torch.equal(a, b)
    raw = torch.from_numpy(datasets.CIFAR10(str(cifar_root), train=False).data).float() / 255
    mean, std = torch.tensor(both[0].statistics)
    assert torch.allclose(a.permute(0, 2, 3, 1), (raw - mean) / std, atol=1e-5)


def test_only_training_images_are_augmented(cifar_root: Path) -> None:
    dm = CIFAR10DataModule(str(cifar_root), augment=True)
    dm.setup()
    torch.manual_seed(0)
    first, second = dm.train_dataset[0][0], dm.train_dataset[0][0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(dm.train_dataset[0][0], first)
    assert torch.equal(dm.test_dataset[0][0], dm.test_dataset[0][0])


def test_augmentation_is_a_shift_of_the_image_or_of_its_mirror() -> None:
    image = torch.randint(1, 256, (1, 3, 8, 8), dtype=torch.uint8)
    plain = Preprocess([0.0] * 3, [1.0] * 3, scale=1.0)
    augment = Preprocess([0.0] * 3, [1.0] * 3, scale=1.0, padding=1, flip=True)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    possible = [plain(p).numpy().tobytes() for s in shifted for p in (s, s.flip(3))]
    seen = {augment(image).numpy().tobytes() for _ in range(400)}
    assert seen == set(possible)
    assert len(seen) == 18


# --- image folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("test", 3)):
        for c, name in enumerate(("cat", "dog", "eel")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(40 * c, 40 * c + 80, (20, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return tmp_path


def test_folder_parts_classes_and_measured_statistics(folder: Path) -> None:
    dms = [ImageFolderDataModule(str(folder), image_size=16, in_memory=m, val_fraction=0.2) for m in (True, False)]
    for dm in dms:
        assert (dm.shape, dm.num_classes, dm.classes) == ((3, 16, 16), 3, ["cat", "dog", "eel"])
        dm.setup()
        assert [len(d) for d in (dm.train_dataset, dm.val_dataset, dm.test_dataset)] == [24, 6, 9]
        assert torch.bincount(dm.val_dataset.targets).tolist() == [2, 2, 2]
    x, _ = everything(dms[0].train_dataloader())
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert dms[0].statistics == dms[1].statistics
    assert torch.equal(dms[0].test_dataset[5][0], dms[1].test_dataset[5][0])


def test_folder_test_stage_uses_the_training_statistics(folder: Path) -> None:
    alone, whole = ImageFolderDataModule(str(folder), image_size=8), ImageFolderDataModule(str(folder), image_size=8)
    alone.setup("test")
    whole.setup()
    assert alone.statistics == whole.statistics


def test_folder_given_statistics_and_own_validation(folder: Path) -> None:
    for name in ("cat", "dog", "eel"):
        (folder / "val" / name).mkdir(parents=True)
        Image.new("L", (9, 30), 128).save(folder / "val" / name / "grey.png")
    dm = ImageFolderDataModule(str(folder), image_size=8, mean=[0.5] * 3, std=[0.5] * 3)
    dm.setup("fit")
    assert (len(dm.train_dataset), len(dm.val_dataset)) == (30, 3)
    x, _ = dm.val_dataset[0]
    assert torch.allclose(x, torch.full((3, 8, 8), (128 / 255 - 0.5) / 0.5), atol=1e-6)


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    images = ImageTensors(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(4).long())
    images.preprocess = Preprocess(*images.statistics())
    assert images[0][0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"mean": [0.5] * 3}, "both or neither"),
        ({"mean": [0.5], "std": [0.5]}, "three numbers"),
    ],
)
def test_folder_refuses_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ImageFolderDataModule(**arguments)


def test_folder_refuses_layouts(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="one folder a class"):
        ImageFolderDataModule(str(folder / "nowhere")).setup()
    (folder / "test" / "fox").mkdir()
    dm = ImageFolderDataModule(str(folder), image_size=8)
    with pytest.raises(InvalidArgument, match=r"different classes \(fox\)"):
        dm.setup("test")
    (folder / "train" / "fox").mkdir()
    with pytest.raises(InvalidArgument, match="holds no image"):
        ImageFolderDataModule(str(folder)).setup("fit")


# --- the batch form


def test_tensor_batch_reads_like_a_list_of_samples() -> None:
    batch = TensorBatch(torch.arange(6).view(3, 2), torch.tensor([4, 5, 6]))
    assert len(batch) == 3
    assert [int(y) for _, y in batch] == [4, 5, 6]
    assert batch[-1][0].tolist() == [4, 5]


def test_an_image_beyond_the_end_is_an_index_error() -> None:
    digits = DigitsDataModule()
    digits.setup("test")
    with pytest.raises(IndexError):
        digits.test_dataset[359]
    assert len(list(digits.test_dataset)) == 359


# --- wrap_train


def test_only_the_training_part_is_wrapped() -> None:
    digits = DigitsDataModule(wrap_train=lambda d: NoisyLabels(ImbalancedSubset(d, ratio=5), rate=0.2))
    digits.setup()
    assert isinstance(digits.train_dataset, NoisyLabels)
    assert not isinstance(digits.val_dataset, NoisyLabels)
    x, y = everything(digits.train_dataloader())
    assert len(x) == len(y) == len(digits.train_dataset)
    assert torch.equal(torch.bincount(y), torch.bincount(digits.train_dataset.targets))


def test_wrap_train_must_return_a_dataset() -> None:
    with pytest.raises(InvalidArgument, match="returned NoneType"):
        DigitsDataModule(wrap_train=lambda d: None).setup("fit")


CONFIG = """
model:
  class_path: lightning_methods.Classifier
  init_args:
    net: {class_path: lightning_methods.models.MLP, init_args: {in_features: 64}}
data:
  class_path: lightning_methods.DigitsDataModule
  init_args:
    flat: true
    wrap_train: %s
trainer: {accelerator: cpu, barebones: true}
"""


@pytest.mark.parametrize(
    ("entry", "check"),
    [
        ("{class_path: lightning_methods.NoisyLabels, init_args: {rate: 0.4}}", lambda d: d.is_noisy.sum() == 503),
        (
            "{class_path: lightning_methods.NoisyLabels, init_args: {rate: 0.5, kind: pair_flip, seed: 2}}",
            lambda d: d.is_noisy.sum() > 600,
        ),
        ("{class_path: lightning_methods.ImbalancedSubset, init_args: {ratio: 10}}", lambda d: d.counts[0] == 124),
        ("{class_path: lightning_methods.ImbalancedSubset, init_args: {counts: {3: 7}}}", lambda d: d.counts[3] == 7),
    ],
)
def test_noise_and_imbalance_are_one_yaml_entry(entry: str, check: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % entry)
    cli = LightningCLI(run=False, args=["--config", str(config)], save_config_callback=None)
    cli.datamodule.setup("fit")
    assert check(cli.datamodule.train_dataset)


def test_wrap_train_by_command_line_arguments(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % "null")
    more = ["--data.wrap_train=lightning_methods.NoisyLabels", "--data.wrap_train.rate=0.1"]
    cli = LightningCLI(run=False, args=["--config", str(config), *more], save_config_callback=None)
    assert isinstance(cli.model, Classifier)
    cli.datamodule.setup("fit")
    assert cli.datamodule.train_dataset.transition[0, 0] == pytest.approx(0.9)


@pytest.mark.parametrize("name", ["DigitsDataModule", "MNISTDataModule", "CIFAR10DataModule", "ImageFolderDataModule"])
def test_every_module_is_made_by_the_command_line(name: str) -> None:
    args = ["--model=lightning_methods.Classifier", "--model.net=lightning_methods.models.CIFARResNet"]
    args += [f"--data=lightning_methods.{name}", "--data.wrap_train=lightning_methods.NoisyLabels"]
    args += ["--data.wrap_train.rate=0.2", "--trainer.barebones=true", "--trainer.accelerator=cpu"]
    cli = LightningCLI(run=False, args=args, save_config_callback=None)
    assert type(cli.datamodule).__name__ == name
    assert isinstance(cli.trainer, Trainer)
