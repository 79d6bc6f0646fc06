"""Checkpoints of several files, and what happens to the old ones when something goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from confprune import checkpoint, files
from confprune.checkpoint.layout import read_layout
from confprune.levels import levels_of


def contents(folder):
    """Every file under a folder, hidden ones too, and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def file(tmp_path):
    """A checkpoint in a single file, and an old output beside it."""
    tensors = {"a.weight": torch.randn(16, 16), "embed.weight": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "pruned.safetensors").write_text("of last time")
    return tmp_path / "model.safetensors"


SHARDS = {
    "model-00001-of-00002.safetensors": {"b.weight": (9, 7), "b.bias": (9,)},
    "model-00002-of-00002.safetensors": {"a.weight": (5, 5), "embed.weight": (4, 4)},
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as save_pretrained leaves it, and what else people have in such folders."""
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / ".cache").mkdir()
    places = {}
    for name, shapes in SHARDS.items():
        tensors = {key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "empty").touch()
    (folder / ".gitattributes").touch()
    (folder / ".cache" / "download").write_text("of the hub")
    return folder


def prune(source, out, **options):
    return checkpoint.prune(source, out, **{"sparsity": 0.5, "progress": False} | options)


def all_tensors(folder):
    return {
        tensor.name: load_file(folder / name)[tensor.name]
        for name in SHARDS
        for tensor in read_layout(folder / name).tensors
    }


# Several files.


def test_a_folder_is_pruned_as_a_whole_and_its_rest_copied(folder, tmp_path):
    before = contents(folder)
    result = prune(folder, tmp_path / "pruned-{sparsity}", sparsity=[0.3, 0.7])
    assert contents(folder) == before
    dense = all_tensors(folder)
    weights = {name: dense[name] for name in ("b.weight", "a.weight")}
    assert list(result.names) == list(weights)
    levels = levels_of(weights, [0.3, 0.7])
    for j, sparsity in enumerate((0.3, 0.7)):
        out = tmp_path / f"pruned-{sparsity}"
        after = contents(out)
        assert after.keys() == before.keys() - {os.path.join(".cache", "download")}
        assert all(after[name] == before[name] for name in after.keys() - SHARDS.keys())
        for name, tensor in all_tensors(out).items():
            expected = dense[name].clone()
            if name in weights:
                expected[~levels.mask(name, j)] = 0
            assert torch.equal(tensor, expected), name
        for name in SHARDS:
            assert read_layout(out / name).metadata["confprune.sparsity"] == str(sparsity)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pruned-0.3", "pruned-0.7"]


def test_an_index_stands_for_its_files_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    prune(folder / "model.safetensors.index.json", tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {*SHARDS, "model.safetensors.index.json"}
    prune(folder, tmp_path / "whole")
    for name in SHARDS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_index_does_not_look_for_is_not_part_of_the_network(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    del places["weight_map"]["b.weight"]
    index.write_text(json.dumps(places))
    assert prune(folder, tmp_path / "out").names == ("a.weight",)
    assert torch.equal(all_tensors(tmp_path / "out")["b.weight"], all_tensors(folder)["b.weight"])


def test_a_folder_with_one_file_of_another_name(file, tmp_path):
    folder = tmp_path / "diffusers"
    folder.mkdir()
    shutil.copy(file, folder / "diffusion_model.safetensors")
    prune(folder, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"diffusion_model.safetensors"}


def test_other_weights_are_copied_with_a_warning(folder, tmp_path):
    (folder / "pytorch_model.bin").write_text("dense")
    with pytest.warns(UserWarning, match=r"copied as they are, not pruned: pytorch_model\.bin"):
        prune(folder, tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_model.bin").read_text() == "dense"


def break_index(folder, change):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            FileNotFoundError,
            r"looks for tensor 'a.weight' in model-00002-of-00002.safetensors, which is missing",
        ),
        (
            lambda f: break_index(f, lambda c: c["weight_map"].update(x="b.safetensors")),
            FileNotFoundError,
            r"looks for tensor 'x' in b.safetensors, which is missing",
        ),
        (
            lambda f: break_index(
                f, lambda c: c["weight_map"].update(x="model-00001-of-00002.safetensors")
            ),
            ValueError,
            r"looks for tensor 'x' in model-00001-of-00002.safetensors, which lacks it",
        ),
        (
            lambda f: break_index(f, lambda c: c["weight_map"].update(x="../secret.safetensors")),
            ValueError,
            "weight_map must name files beside it",
        ),
        (lambda f: break_index(f, lambda c: c.pop("weight_map")), ValueError, "is not an index"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            ValueError,
            "is not an index",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            ValueError,
            "holds several checkpoints: name one of model-00001-of-00002.safetensors, model-00002",
        ),
        (
            lambda f: [path.unlink() for path in f.glob("model*")],
            ValueError,
            "holds no safetensors file: save the network in that format first",
        ),
    ],
)
def test_broken_folders(folder, tmp_path, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        prune(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*index\.json"):
        prune(tmp_path / "model.safetensors.index.json", tmp_path / "out")


# Where the output goes.


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("model.safetensors", ValueError, "must be a folder: .*model has several files"),
        ("file", ValueError, "must be a folder: .*model has several files"),
        ("full", FileExistsError, "is not empty: remove it, or name another folder"),
        ("model", FileExistsError, "is not empty"),
        ("model/pruned", ValueError, "lies within .*model: name a folder outside"),
        ("no/where", FileNotFoundError, "no is not a folder"),
    ],
)
def test_places_that_a_folder_cannot_take(folder, tmp_path, out, error, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        prune(folder, tmp_path / out)
    assert contents(tmp_path) == before


def test_places_that_a_file_cannot_take(file, tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file to write"):
        prune(file, tmp_path)
    with pytest.raises(ValueError, match=r"one place for 2 sparsities: write {sparsity} where"):
        prune(file, tmp_path / "out.safetensors", sparsity=[0.1, 0.2])


def test_a_link_is_followed(file, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "target.safetensors")
    prune(file, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert load_file(tmp_path / "target.safetensors").keys() == load_file(file).keys()


def test_a_file_may_take_the_place_of_its_source(file, tmp_path):
    prune(file, tmp_path / "pruned.safetensors")
    prune(file, file)
    assert file.read_bytes() == (tmp_path / "pruned.safetensors").read_bytes()


@pytest.fixture(params=["without a name", "no /proc", "another system"])
def kind_of_draft(request, monkeypatch):
    """Files without a name, and the temporary names of systems that have none."""
    if request.param == "no /proc":
        monkeypatch.setattr(files, "_DESCRIPTORS", "/nowhere")
    if request.param == "another system":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


@pytest.mark.usefixtures("kind_of_draft")
def test_written_files_have_the_rights_of_any_new_file(file, tmp_path):
    (tmp_path / "any").write_text("")
    prune(file, tmp_path / "rights.safetensors")
    checkpoint.save(nn.Linear(2, 2), tmp_path / "saved.safetensors")
    for name in ("rights.safetensors", "saved.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "any").stat().st_mode


# What goes wrong on the way.


def fail_at_write(monkeypatch, number, error):
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) > number:
            raise error
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.usefixtures("kind_of_draft")
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_changes_nothing(file, tmp_path, monkeypatch, number, error):
    before = contents(tmp_path)
    fail_at_write(monkeypatch, number, error)
    with pytest.raises(type(error)):
        prune(file, tmp_path / "pruned-{sparsity}.safetensors", sparsity=[0.5, 0.6])
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("kind_of_draft")
def test_a_failed_write_leaves_no_folder(folder, tmp_path, monkeypatch):
    before = contents(tmp_path)
    fail_at_write(monkeypatch, 5, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"cannot write .*out: No space left"):
        prune(folder, tmp_path / "out")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("kind_of_draft")
def test_a_folder_that_cannot_be_named_is_taken_away(folder, tmp_path, monkeypatch):
    before = contents(tmp_path)

    def rename(*paths):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError):
        prune(folder, tmp_path / "out")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_writes_that_take_a_part_are_continued(file, tmp_path, monkeypatch):
    prune(file, tmp_path / "expected.safetensors")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, offset: real(f, data[:100], offset))
    prune(file, tmp_path / "pruned.safetensors")
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "pruned.safetensors").read_bytes() == expected


def test_a_full_disk_is_noticed_before_the_work(file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10))
    with pytest.raises(OSError, match=r"bytes are needed in .*, where 10 are free") as raised:
        prune(file, tmp_path / "pruned.safetensors")
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "pruned.safetensors").read_text() == "of last time"


KILLED = """
import os, signal, sys
from confprune import checkpoint
real, calls = os.pwrite, []
def pwrite(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
os.pwrite = pwrite
for source, out in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        checkpoint.prune(source, out, sparsity=0.5, progress=False)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(files._unnamed("/tmp") is None, reason="needs files without a name")
def test_a_killed_process_leaves_nothing_behind(file, folder, tmp_path):
    before = contents(tmp_path)
    paths = [file, tmp_path / "pruned.safetensors", folder, tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *paths], check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == [str(-signal.SIGKILL)] * 2
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_nan_is_named_with_its_file(tmp_path, dtype):
    tensors = {name: torch.randn(4, 4).to(dtype) for name in ("a.weight", "b.weight", "c.weight")}
    tensors["a.weight"][1, 1] = torch.inf
    tensors["b.weight"][2, 3] = -torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path / "pruned.safetensors"
    with pytest.raises(ValueError, match=r"tensor 'b.weight' in .*model.safetensors holds NaN"):
        prune(tmp_path / "model.safetensors", out)
    prune(tmp_path / "model.safetensors", out, exclude=["b.*"])
    assert load_file(out)["b.weight"].isnan().sum() == 1


def test_a_file_that_is_cut_short_is_named_with_its_tensor(file, tmp_path):
    last = read_layout(file).tensors[-1]
    os.truncate(file, last.end - 1)
    with pytest.raises(ValueError, match=rf"is cut short: tensor '{last.name}' ends at byte"):
        prune(file, tmp_path / "pruned.safetensors")
    assert (tmp_path / "pruned.safetensors").read_text() == "of last time"


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x02" + bytes(7) + b"{}" + b"x", b"x" * 99])
def test_other_files_are_not_safetensors_files(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        read_layout(tmp_path / "model.safetensors")


def test_a_file_that_shrinks_while_it_is_read(file, tmp_path, monkeypatch):
    from confprune.checkpoint import pruning

    def shrunk(*arguments):
        os.truncate(file, 500)
        return real(*arguments)

    real = pruning._write_pruned
    monkeypatch.setattr(pruning, "_write_pruned", shrunk)
    with pytest.raises(OSError, match=r"tensor 'a.weight' cannot be read: .*ends at byte 500"):
        prune(file, tmp_path / "pruned.safetensors")
    assert (tmp_path / "pruned.safetensors").read_text() == "of last time"


def test_bad_scopes_and_criteria_are_named(file, tmp_path):
    for option in ("scope", "criterion"):
        with pytest.raises(ValueError, match=f"{option} 'best' is unknown"):
            prune(file, tmp_path / "out.safetensors", **{option: "best"})
