"""Files: what a full disk does to them."""

import errno
import os
import subprocess

import numpy as np
import pytest

from retro.common import files


@pytest.fixture
def full_disk(tmp_path):
    """A folder of a file system of 64 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounts nothing here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def save_faiss(path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(8)
    index.add(np.zeros((8192, 8), np.float32))
    with files.written_aside(path) as aside:
        faiss.write_index(index, str(aside))


def save_safetensors(path):
    from safetensors.numpy import save_file

    with files.written_aside(path) as aside:
        save_file({"x": np.zeros(1 << 16)}, aside)


def save_tokenizer(path):
    from tokenizers import Tokenizer, models

    words = {f"a long word {i}": i for i in range(9000)}
    with files.written_aside(path) as aside:
        Tokenizer(models.WordLevel(words, "a long word 0")).save(str(aside))


WRITERS = {
    "array": lambda path: files.save_npy(path, np.zeros(1 << 16)),
    "json": lambda path: files.save_json(path, "x" * (1 << 17)),
    "json lines": lambda path: files.save_json_lines(path, [{"x": "x" * (1 << 17)}]),
    "result": lambda path: files.write_result(path, "x" * (1 << 17)),
    "mapped": lambda path: files.new_npy(path, np.int32, (1 << 16,)),
    "faiss": save_faiss,
    "safetensors": save_safetensors,
    "tokenizer": save_tokenizer,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(full_disk, write):
    with pytest.raises(OSError) as error:
        write(full_disk / "file")
    assert error.value.errno == errno.ENOSPC
    said = f"{full_disk / 'file'}: No space left on device; make room and run this again."
    assert files.os_error_text(error.value) == said
    assert not list(full_disk.iterdir()) or write is WRITERS["mapped"]  # which is written aside, or in a folder aside


@pytest.mark.parametrize("reserve", [None, errno.EOPNOTSUPP], ids=["reserved", "written"])
def test_a_mapped_array_has_its_space_before_it_is_written(tmp_path, monkeypatch, reserve):
    def refuse(*_):
        raise OSError(reserve, os.strerror(reserve))

    if reserve is not None:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    array = files.new_npy(tmp_path / "a.npy", np.int32, (300_000, 2))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes and not array.any()
    array[:] = 7
    array.flush()
    assert (np.load(tmp_path / "a.npy") == array).all()
    assert files.new_npy(tmp_path / "b.npy", np.int32, (0, 2)).shape == np.load(tmp_path / "b.npy").shape == (0, 2)
