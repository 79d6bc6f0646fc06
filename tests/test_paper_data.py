"""The data of the paper's experiments: IDX files, images and masks, stand-ins, checkpoints."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.paper import data
from benchmarks.paper.__main__ import main
from benchmarks.paper.idx import PARTS, find_mnist, read_idx, read_labelled
from benchmarks.paper.images import find_pairs, read_pairs
from benchmarks.paper.networks import UNet, load_unet
from benchmarks.paper.polyps import CENTRES, generate
from benchmarks.paper.sizes import QUICK

# IDX files.


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.tobytes()


def images(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 5, 4), dtype=np.uint8)


def labels(number: int) -> np.ndarray:
    return (np.arange(number) % 10).astype(np.uint8)


def write_mnist(folder, *, number=30, suffix="", dot="-", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        of_images = name.endswith("images")
        content = idx(images(number) if of_images else labels(number))
        path = folder / f"{name}{dot}idx{3 if of_images else 1}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_or_packed(tmp_path, packed):
    for shape in ((3, 5, 4), (7,), (0, 2, 2)):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        content = idx(array)
        (tmp_path / "file").write_bytes(gzip.compress(content) if packed else content)
        assert np.array_equal(read_idx(tmp_path / "file"), array)


WHOLE = idx(images(3))
PACKED = gzip.compress(WHOLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: it does not begin with two zero bytes"),
        (b"\x89PNG\r\n", "is not an IDX file"),
        (WHOLE[:10], "is truncated: it ends within its header"),
        (WHOLE[:-1], "is truncated: its header announces 3x5x4 = 60 values and 59 follow"),
        (WHOLE + b"x", "is corrupt: its header announces 3x5x4 = 60 values and 61 follow"),
        (idx(images(3), kind=0x0D), r"holds values of type 0x0d, not unsigned bytes \(0x08\)"),
        (PACKED[:-9], "is truncated or corrupt: "),
        (PACKED[:15] + b"????" + PACKED[19:], "is truncated or corrupt: "),
        (PACKED[:-6] + b"????" + PACKED[-2:], "is truncated or corrupt: "),
    ],
)
def test_bad_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte {message}"):
        read_idx(path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (labels(3), labels(3), r"a holds an array of shape \[3\], not images"),
        (images(3), images(3), r"b holds an array of shape \[3, 5, 4\], not labels"),
        (images(3), labels(4), "a holds 3 images and .*b 4 labels"),
        (images(0), labels(0), "a holds no images"),
        (images(1), labels(1) + 10, "b holds the label 10, not one of 10 classes"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_named(tmp_path, first, second, message):
    (tmp_path / "a").write_bytes(idx(first))
    (tmp_path / "b").write_bytes(idx(second))
    with pytest.raises(ValueError, match=message):
        read_labelled(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("where", [".", "MNIST/raw"])
@pytest.mark.parametrize("form", [{}, {"suffix": ".gz", "packed": True}, {"dot": "."}])
def test_mnist_is_found_as_it_is_handed_around(tmp_path, where, form):
    write_mnist(tmp_path / where, **form)
    source = data.classification(tmp_path, QUICK, seed=0)
    assert (source.name, source.stand_in) == ("MNIST", False)
    assert source.training.inputs.shape == (30, 1, 5, 4)
    assert len(source.scoring) + len(source.pool) == 30
    assert 0 <= source.training.inputs.min() < source.training.inputs.max() <= 1


def test_of_a_plain_and_a_packed_file_the_plain_is_taken(tmp_path):
    write_mnist(tmp_path)
    write_mnist(tmp_path, suffix=".gz", packed=True)
    assert all(path.suffix != ".gz" for path in find_mnist(tmp_path).values())


def test_a_part_of_mnist_is_not_enough(tmp_path):
    assert find_mnist(tmp_path) is None
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        ValueError, match=r"a part of MNIST only; missing: t10k-labels \(their digits"
    ):
        find_mnist(tmp_path)


# Folders of images.


def write_pair(folder, image, mask, *, size=(12, 10), mode="RGB", value=255):
    for path in (folder / image, folder / mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(image))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(
        folder / image
    )
    drawn = np.zeros((size[1], size[0]), dtype=np.uint8)
    drawn[: size[1] // 2] = value  # the upper half
    Image.fromarray(drawn).save(folder / mask)


ARRANGEMENTS = {
    "flat": [("images/a.png", "masks/a.png", "all"), ("images/b.jpg", "masks/b.png", "all")],
    "centres within": [
        ("images/C1/a.png", "masks/C1/a.png", "C1"),
        ("images/C2/a.png", "masks/C2/a.png", "C2"),
    ],
    "centres above": [
        ("C1/images/a.png", "C1/masks/a.png", "C1"),
        ("deep/C2/images/a.png", "deep/C2/masks/a.png", "deep/C2"),
    ],
    "PolypGen": [
        ("data_C1/images_C1/1_endocv.jpg", "data_C1/masks_C1/1_endocv_mask.jpg", "data_C1"),
        ("data_C2/images_C2/1_endocv.JPEG", "data_C2/masks_C2/1_endocv_mask.jpg", "data_C2"),
    ],
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_images_and_masks_are_found_in_any_arrangement(tmp_path, arrangement):
    expected = ARRANGEMENTS[arrangement]
    for image, mask, _ in expected:
        write_pair(tmp_path, image, mask)
    (tmp_path / "images_of_no_folder.txt").touch()
    pairs = find_pairs(tmp_path)
    found = {(p.image.relative_to(tmp_path).as_posix(),
              p.mask.relative_to(tmp_path).as_posix(), p.centre) for p in pairs}  # fmt: skip
    assert found == set(expected)


def test_images_of_mixed_sizes_and_modes_are_scaled(tmp_path):
    for number, (mode, size, value) in enumerate(
        [("RGB", (12, 10), 255), ("L", (40, 64), 1), ("RGBA", (16, 16), 200), ("P", (5, 9), 255)]
    ):
        write_pair(tmp_path, f"images/{number}.png", f"masks/{number}.png", mode=mode, size=size,
                   value=value)  # fmt: skip
    pictures, masks = read_pairs(find_pairs(tmp_path), 16, progress=False)
    assert (pictures.shape, pictures.dtype) == ((4, 16, 16, 3), np.uint8)
    assert (masks.shape, masks.dtype) == ((4, 16, 16), np.bool_)
    assert masks[:, :6].all()
    assert not masks[:, 10:].any()


def test_a_folder_of_images_becomes_a_source(tmp_path):
    for number in range(20):
        centre = "AB"[number % 2]
        write_pair(tmp_path, f"{centre}/images/{number}.png", f"{centre}/masks/{number}.png")
    source = data.segmentation(tmp_path, QUICK, seed=0, progress=False)
    assert (source.name, source.stand_in) == (f"images in {tmp_path.name}", False)
    sizes = [len(part) for part in (source.training, source.scoring, source.pool)]
    assert sizes == [8, 2, 10]
    assert source.pool.inputs.shape == (10, 3, QUICK.pixels, QUICK.pixels)
    assert source.pool.targets.shape == (10, 1, QUICK.pixels, QUICK.pixels)
    assert set(source.pool.groups) <= {"A", "B"}


def spoil(folder, case):
    write_pair(folder, "images/a.png", "masks/a.png")
    if case == "no masks":
        (folder / "masks/a.png").unlink()
        (folder / "masks").rmdir()
    elif case == "empty":
        (folder / "images/a.png").unlink()
    elif case == "image alone":
        (folder / "masks/a.png").rename(folder / "masks/b.png")
    elif case == "mask alone":
        Image.new("L", (12, 10)).save(folder / "masks/b.png")
    elif case == "other size":
        Image.new("L", (12, 11)).save(folder / "masks/a.png")
    elif case == "no image":
        (folder / "images/a.png").write_bytes(b"not an image at all")
    else:
        name = "a.png"
        if case == "truncated jpeg":
            (folder / "images/a.png").unlink()
            name = "a.jpg"
            Image.new("RGB", (64, 64), "red").save(folder / "images" / name)
            Image.new("L", (64, 64)).save(folder / "masks/a.png")
        path = folder / "images" / name
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no masks", "images has no masks: there is no folder .*masks"),
        ("empty", "images is empty: it holds no .png, .jpg, .jpeg files"),
        ("image alone", "a.png has no mask in .*masks"),
        ("mask alone", "b.png has no image in .*images"),
        ("other size", "masks.a.png is 12x11 pixels, but its image .*images.a.png is 12x10"),
        ("no image", "images.a.png is corrupt or not an image"),
        ("truncated png", "images.a.png is corrupt or not an image"),
        ("truncated jpeg", "images.a.jpg is corrupt or not an image"),
    ],
)
def test_bad_images_and_masks_are_named(tmp_path, case, message):
    spoil(tmp_path, case)
    with pytest.raises(ValueError, match=message):
        data.segmentation(tmp_path, QUICK, seed=0, progress=False)


def test_without_pillow_it_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    write_pair(tmp_path, "images/a.png", "masks/a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        read_pairs(find_pairs(tmp_path), 16, progress=False)


# Generated polyps.


def test_generated_polyps_are_seeded_and_their_masks_exact():
    pictures, masks, centres = generate(12, 32, seed=3)
    again = generate(12, 32, seed=3)
    assert np.array_equal(pictures, again[0])
    assert np.array_equal(masks, again[1])
    assert not np.array_equal(pictures, generate(12, 32, seed=4)[0])
    assert (pictures.shape, pictures.dtype) == ((12, 32, 32, 3), np.uint8)
    assert centres == list(CENTRES) * 4
    assert masks.any((1, 2)).all()
    assert not masks.all((1, 2)).any()


def test_generated_polyps_stand_out_more_in_the_easy_centre():
    pictures, masks, centres = generate(90, 32, seed=0)
    red = pictures[..., 0].astype(float) - pictures[..., 1:].mean(-1)

    def contrast(centre):
        of = [i for i, name in enumerate(centres) if name == centre]
        return np.mean([abs(red[i][masks[i]].mean() - red[i][~masks[i]].mean()) for i in of])

    assert contrast("A") > contrast("B") > contrast("C")


def test_without_files_there_are_stand_ins_that_say_so(tmp_path):
    for folder in (None, tmp_path):
        digits = data.classification(folder, QUICK, seed=0)
        polyps = data.segmentation(folder, QUICK, seed=0, progress=False)
        for source in (digits, polyps):
            assert source.stand_in
            assert "(stand-in)" in source.name


def test_the_parts_of_a_source_have_no_image_in_common():
    source = data.segmentation(None, QUICK, seed=0, progress=False)
    seen = [
        picture.numpy().tobytes()
        for part in (source.training, source.scoring, source.pool)
        for picture in part.inputs
    ]
    assert len(seen) == len(set(seen))
    part = QUICK.segmentation
    assert len(seen) == part.training + part.scoring + part.pool


# Checkpoints.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_any_width_is_loaded(tmp_path, suffix):
    model = UNet(width=4)
    path = tmp_path / f"unet{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    loaded = load_unet(path)
    assert loaded.deviations is None
    assert not loaded.model.training
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.model(x), model.eval()(x))


def checkpoint(folder, case):
    state = UNet(width=2).state_dict()
    path = folder / ("model.safetensors" if case == "bad safetensors" else "model.pt")
    if case == "missing":
        del state["up1.0.weight"]
    elif case == "unknown":
        state["extra"] = torch.zeros(1)
    elif case == "shape":
        state["up1.0.weight"] = torch.zeros(2, 6, 5, 5)
    elif case == "other network":
        state = torch.nn.Linear(3, 2).state_dict()
    if case == "a module":
        torch.save({"model": {"deep": state}}, path)
    elif case == "code":
        torch.save(torch.nn.Linear(2, 2), path)
    elif case in ("bad safetensors", "garbage"):
        path.write_bytes(b"garbage")
    elif case != "absent":
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "another architecture .*UNet: up1.0.weight is missing$"),
        ("unknown", "another architecture .*: extra is unknown$"),
        ("shape", r"up1.0.weight has shape \[2, 6, 5, 5\] instead of \[2, 6, 3, 3\]"),
        ("other network", r"down1.0.weight is missing \(and \d+ more differences\)"),
        ("a module", "model.pt is not a state dict: names and tensors"),
        ("code", "model.pt is not a state dict"),
        ("garbage", "model.pt is (corrupt|not a)"),
        ("bad safetensors", "model.safetensors is corrupt or not a checkpoint"),
        ("absent", "there is no checkpoint .*model.pt"),
    ],
)
def test_checkpoints_of_another_kind_are_named(tmp_path, case, message):
    with pytest.raises(ValueError, match=message):
        load_unet(checkpoint(tmp_path, case))


# What the command says.


def test_the_command_names_what_is_wrong_before_any_training(tmp_path, capsys):
    out = tmp_path / "out"
    spoilt = tmp_path / "spoilt"
    spoil(spoilt, "other size")
    for arguments, message in [
        (["--data", str(tmp_path / "nowhere")], "nowhere is not a folder"),
        (["--data", str(spoilt)], "12x11 pixels"),
        (["--checkpoint", str(checkpoint(tmp_path, "shape"))], "another architecture"),
    ]:
        assert main([*arguments, "--out", str(out), "--quick", "--quiet"]) == 2
        assert message in capsys.readouterr().err
    out.touch()
    assert main(["--out", str(out), "--quick"]) == 2
    assert "out is a file, not a folder" in capsys.readouterr().err
