"""Files with checksums by blocks: whatever is read of a damaged block is refused, what is read of others is not."""

import numpy as np
import pytest

from retro.common import checksums
from retro.common.checksums import CheckedFile, open_array, open_checked
from retro.common.files import check_files, file_record, save_npy
from retro.common.records import load_record, save_record

ROWS, WIDTH = 50_000, 5  # float64: 15.3 blocks


@pytest.fixture
def folder(tmp_path):
    save_npy(tmp_path / "a.npy", np.arange(ROWS * WIDTH, dtype=np.float64).reshape(ROWS, WIDTH))
    return tmp_path


def flip(file, at):
    with open(file, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 4]))


def columns(array):
    return array[:, 1:3] if isinstance(array, np.ndarray) else array.view(lambda whole: whole[:, 1:3])


READS = {
    "rows": lambda array, row: array[np.array([0, row, -1])],
    "negative rows": lambda array, row: array[[row - ROWS]],
    "one row": lambda array, row: array[row],
    "a value": lambda array, row: array[row, 2],
    "some columns of rows": lambda array, row: array[np.array([row]), :2],
    "rows back to front": lambda array, row: array[row + 3 : row - 3 : -1],
    "a mask": lambda array, row: array[np.arange(ROWS) == row],
    "all": lambda array, row: np.asarray(array),
    "a sum": lambda array, row: np.sum(array),
    "a comparison": lambda array, row: array > 3,
    "all of some columns": lambda array, row: array[..., 1:],
    "a column's rows": lambda array, row: columns(array)[[row]],
}


@pytest.mark.parametrize("read", READS)
def test_what_is_read_of_a_damaged_block_is_refused(folder, read):
    files, row = {"a.npy": file_record(folder / "a.npy")}, ROWS // 2
    whole = np.load(folder / "a.npy")
    np.testing.assert_array_equal(READS[read](open_array(folder, "a.npy", files), row), READS[read](whole, row))
    flip(folder / "a.npy", 128 + 8 * (WIDTH * row + 2))
    array = open_array(folder, "a.npy", files)
    for _ in range(2):
        with pytest.raises(ValueError, match="a.npy is damaged"):
            READS[read](array, row)
    np.testing.assert_array_equal(array[:1000], whole[:1000])
    with pytest.raises(ValueError, match="a.npy is damaged"):
        check_files(folder, files, checksums=True)


def test_a_block_is_compared_once(folder, monkeypatch):
    counted, count = [], checksums.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(checksums.xxhash, "xxh3_64_intdigest", lambda data: counted.append(len(data)) or count(data))
    files = {"a.npy": file_record(folder / "a.npy")}
    counted.clear()
    array = open_array(folder, "a.npy", files)
    assert len(counted) == 2 and not array.file.is_sound  # the ends
    for _ in range(2):
        array[[3, 30_000]], array[30_000:30_010]
        assert len(counted) == 3
    np.asarray(array), array[[7]]
    assert sum(counted) == files["a.npy"]["bytes"] and array.file.is_sound


@pytest.mark.parametrize("at", [3, 70, -1])
def test_ends_are_compared_at_the_opening(folder, at):
    files = {"a.npy": file_record(folder / "a.npy")}
    flip(folder / "a.npy", at % files["a.npy"]["bytes"])
    with pytest.raises(ValueError, match="a.npy is damaged"):
        open_array(folder, "a.npy", files)


def test_a_file_is_read_as_it_is(folder):
    file, content = folder / "a.npy", (folder / "a.npy").read_bytes()
    with open_checked(folder, file.name, {file.name: file_record(file)}).opened() as opened:
        opened.seek(-10, 2)
        assert (opened.read(4), opened.tell(), opened.read()) == (content[-10:-6], len(content) - 6, content[-6:])
        opened.seek(300_000)
        assert opened.read(200_000) == content[300_000:500_000]


def test_what_does_not_fit_its_record(folder):
    record = file_record(folder / "a.npy")
    for wrong in ({}, record | {"xxh3": "?"}, record | {"xxh3": record["xxh3"][:-12]}, record | {"bytes": None}):
        with pytest.raises(ValueError, match="no checksums that fit .*a.npy"):
            CheckedFile(folder / "a.npy", wrong)
    files = {"a.npy": record}
    with pytest.raises(
        ValueError, match=r"a.npy has shape \(50000, 5\) of float64, but is recorded as \(1, 5\) of int"
    ):
        open_array(folder, "a.npy", files, (1, 5), np.int32)
    with pytest.raises(ValueError, match="no checksum of .*b.npy is recorded"):
        open_array(folder, "b.npy", files)
    (folder / "a.npy").unlink()
    with pytest.raises(ValueError, match="a.npy is missing"):
        open_array(folder, "a.npy", files)
    (folder / "empty").touch()
    check_files(folder, {"empty": file_record(folder / "empty")}, checksums=True)


def test_records_know_what_they_say(tmp_path):
    file, record = tmp_path / "r.json", {"b": [1, 2.5, None], "ä": {"x": "y"}}
    save_record(file, record)
    sound = file.read_bytes()
    assert load_record(file) == record
    for at in range(len(sound)):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
        try:
            assert load_record(file) == record  # white space
        except ValueError as error:
            assert "r.json" in str(error)
    for other in (b"[]", b"{}", b"", b"\xff"):
        file.write_bytes(other)
        with pytest.raises(ValueError, match="r.json"):
            load_record(file)
