"""Documents in: every line is accounted for, and what is refused is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro.text.corpus import expand_inputs, read_documents
from retro.text.documents import Document, Reject
from retro.text.formats import read_partition, split_input
from retro.text.packages import package_documents, package_modules


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_fields_and_default_id(tmp_path):
    lines = [{"id": 7, "text": "a", "title": "t", "source": "s", "date": "2020-01-01", "stars": 5}, {"text": "b"}]
    file = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
    first, second = read_documents([file])
    assert first == Document("7", "a", "t", "s", "2020-01-01", {"stars": 5})
    assert second == Document("x.jsonl:2", "b")


LINES = st.one_of(
    st.just(b""),
    st.just(b"  "),
    st.just(b'{"title": "no text"}'),
    st.just(b'{"text": 3}'),
    st.just(b'{"text": "cut'),
    st.just(b'{"text": "\xff"}'),
    st.just(b'{"text": "\\ud800"}'),
    st.just(b"[1]"),
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=30).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
    ),
)


@settings(max_examples=100)
@given(
    lines=st.lists(LINES, max_size=12), end=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), final=st.booleans()
)
def test_every_line_is_accounted_for(tmp_path_factory, lines, end, bom, final):
    raw = (b"\xef\xbb\xbf" if bom else b"") + end.join(lines) + (end if final else b"")
    records = list(read_documents([write(tmp_path_factory.mktemp("lines") / "x.jsonl", raw)], on_bad="reject"))
    assert len(records) == raw.count(b"\n") + (not raw.endswith(b"\n") and raw != b"")
    for number, (line, record) in enumerate(zip(lines, records, strict=False), start=1):
        try:
            expected = json.loads(line.decode())["text"]
            expected.encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            blank = not line.strip()
            assert record.text == "" if blank else (record.file, record.line) == ("x.jsonl", number)
        else:
            assert record.text == expected and record.place == f"x.jsonl:{number}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json}", "not JSON"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": null}', "not a string"),
        (b'"text"', "not an object"),
        (b'{"text": "\xe9"}', "invalid UTF-8"),
        (b'{"text": "\\ud83d"}', "invalid UTF-8"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_name_file_line_and_reason(tmp_path, line, reason):
    file = write(tmp_path / "x.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    (bad,) = [record for record in read_documents([file], on_bad="reject") if isinstance(record, Reject)]
    assert (bad.file, bad.line) == ("x.jsonl", 2) and reason in bad.reason
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*" + reason):
        list(read_documents([file]))


def test_gzip_and_its_damage(tmp_path):
    content = gzip.compress(b'{"text": "a"}\n' * 1000)
    assert len(list(read_documents([write(tmp_path / "x.jsonl.gz", content)]))) == 1000
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz:\d+: the compressed file is damaged"):
        list(read_documents([write(tmp_path / "cut" / "x.jsonl.gz", content[:-20])]))
    with pytest.raises(ValueError, match="the compressed file is damaged"):
        list(read_documents([write(tmp_path / "none" / "x.jsonl.gz", b"plain")]))


ROWS = [{"id": "7", "title": "T, x", "text": 'w1 "w2"\nw3'}, {"id": "8", "title": "", "text": "w4\tw5; é"}]


def table(delimiter, rows=ROWS):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def arrow(new):
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with new(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        for row in ROWS:
            writer.write_table(pa.Table.from_pylist([row]))
    return sink.getvalue().to_pybytes()


def zstd(content):
    """Two frames, as programs that compress in parallel write them."""
    import pyarrow as pa

    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:9], content[9:]))


JSONL = "\n".join(map(json.dumps, ROWS)).encode()
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
FILES = {
    "array.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "line.json": lambda: json.dumps(ROWS).encode(),
    "array.jsonl": lambda: b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode(),
    "lines.json": lambda: JSONL,
    "comma.csv": lambda: b"\xef\xbb\xbf" + table(","),
    "semicolon.csv": lambda: table(";"),
    "tab.csv": lambda: table("\t"),
    "tab.tsv": lambda: table("\t"),
    "stream.arrow": lambda: arrow(__import__("pyarrow").ipc.new_stream),
    "file.feather": lambda: arrow(__import__("pyarrow").ipc.new_file),
    **{f"x.jsonl.{ending}": lambda pack=pack: pack(JSONL) for ending, pack in PACKED.items()},
    **{f"x.tsv.{ending}": lambda pack=pack: pack(table("\t")) for ending, pack in PACKED.items()},
    "x.json.zst": lambda: zstd(json.dumps(ROWS, indent=1).encode()),
    "objects.jsonl": lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "arrays.json": lambda: "\n".join(json.dumps([row]) for row in ROWS).encode(),
    "spaced.csv": lambda: b" id , title, text\n" + table(",").partition(b"\n")[2],
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_documents_in_every_kind_of_file(tmp_path, name):
    file = write(tmp_path / name, FILES[name]())
    assert [{"id": d.id, "title": d.title, "text": d.text} for d in read_documents([file])] == ROWS
    (item,) = expand_inputs([file])
    _, parts = split_input(item, 1)
    assert len(parts) == (
        1 if item.kind == "json" else 3 if item.kind == "csv" else 2
    )  # of a table one has the names alone
    assert [d.text for part in parts for d in read_partition(part)] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("ending", PACKED)
def test_what_is_cut_off_is_told(tmp_path, ending):
    packed = PACKED[ending](JSONL * 400)
    with pytest.raises(ValueError, match=rf"x\.jsonl\.{ending}:\d+: the compressed file is damaged"):
        list(read_documents([write(tmp_path / f"x.jsonl.{ending}", packed[: len(packed) // 2])], on_bad="reject"))


def test_rows_that_are_none_name_their_line(tmp_path):
    content = b'id\ttext\n1\t"two\nlines"\n2\n\n3\t"open" end\n4\tgood\n5\t\xff\n6\t"never closed\n'
    found = list(read_documents([write(tmp_path / "x.tsv", content)], on_bad="reject"))
    assert [(d.id, d.text) for d in found if isinstance(d, Document) and d.text] == [("1", "two\nlines"), ("4", "good")]
    bad = [(one.line, one.reason) for one in found if isinstance(one, Reject)]
    for (line, reason), expected in zip(
        bad, [(4, "1 fields"), (6, "no CSV"), (8, "UTF-8"), (9, "no CSV")], strict=True
    ):
        assert line == expected[0] and expected[1] in reason
    with pytest.raises(ValueError, match=r"x\.csv:2: the record has no field 'text' \(it has id, passage; text_field"):
        list(read_documents([write(tmp_path / "x.csv", "id,passage\n1,a\n")]))
    with pytest.raises(ValueError, match=r"x\.csv:1: the line names two columns 'text'"):
        list(read_documents([write(tmp_path / "x.csv", "id,text,text\n1,a,b\n")]))


def test_json_that_is_no_list_of_records(tmp_path):
    assert [d.text for d in read_documents([write(tmp_path / "one.json", '{\n"text": "a"}')])] == ["a"]
    cut = '[{"text": "a"},', '{\n"text": "a"}\n{"text"'
    for content, said in (("[1, 2]", "is a int"), ("[]\n3", "is a int"), *((one, "no JSON array") for one in cut)):
        with pytest.raises(ValueError, match=said):
            list(read_documents([write(tmp_path / "x.json", content)]))


def test_files_that_are_left_out_are_counted_and_named(tmp_path, caplog):
    for name in ("a.txt", "b.pdf", ".c.txt", "sub/d.docx", ".hidden/e.txt"):
        write(tmp_path / name, "x")
    assert len(expand_inputs([str(tmp_path)])) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert "3 of the 4 files" in said and ".c.txt, b.pdf, sub/d.docx" in said


def test_datasets_by_configuration_split_and_stream(tmp_path):
    """A folder as the Hub has them; `datasets` reads it by name in the same way."""
    head = "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files:\n"
    write(
        tmp_path / "set" / "README.md",
        head + "  - {split: train, path: a.jsonl}\n  - {split: test, path: b.jsonl}\n---\n",
    )
    for name in ("one", "a", "b"):
        write(tmp_path / "set" / f"{name}.jsonl", "".join(f'{{"id": "{name}{n}", "text": "w"}}\n' for n in range(4)))
    folder = tmp_path / "set"
    for name, ids in (
        ("two:test", ["b0", "b1", "b2", "b3"]),
        ("two:train[1:3]", ["a1", "a2"]),
        ("two:train[:25%]+test[-1:]", ["a0", "b3"]),
        ("one:train", ["one0", "one1", "one2", "one3"]),
    ):
        assert [d.id for d in read_documents([f"{folder}:{name}"])] == ids
    assert [d.id for d in read_documents([f"stream:{folder}:two:test"])] == ["b0", "b1", "b2", "b3"]
    (item,) = expand_inputs([f"stream:{folder}:two:test"])
    _, parts = split_input(item, 30)
    assert len(parts) > 1
    for order in (parts, parts[::-1], parts):
        assert {d.id for part in order for d in read_partition(part)} == {"b0", "b1", "b2", "b3"}
    with pytest.raises(ValueError, match=r"no dataset that can be loaded \(.*name:configuration:split"):
        list(read_documents([f"{folder}:three:train"]))


def test_folder_of_many_kinds_is_sorted_and_relative(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "in" / "b.jsonl", '{"text": "json"}')
    write(tmp_path / "in" / "sub" / "c.txt", "plain\n\ttext")
    write(tmp_path / "in" / "ignored.bin", "x")
    write(tmp_path / "in" / ".hidden" / "d.txt", "x")
    pq.write_table(pa.table({"text": ["arrow", None], "id": [1, 2]}), tmp_path / "in" / "a.parquet")
    records = list(read_documents([str(tmp_path / "in")], on_bad="reject"))
    assert [record.text for record in records if isinstance(record, Document)] == ["arrow", "json", "plain\n\ttext"]
    assert [item.name for item in expand_inputs([str(tmp_path / "in")])] == ["a.parquet", "b.jsonl", "sub/c.txt"]
    assert [item.name for item in expand_inputs([str(tmp_path / "**" / "?.[jt]*")])] == ["b.jsonl", "sub/c.txt"]
    assert records[-1].id == "sub/c.txt" and records[1].line == 2


def test_parquet_rows_that_are_not_utf8_and_damaged_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets, content = (0).to_bytes(4, "little") + b"\1\0\0\0\2\0\0\0\3\0\0\0", b"a\xffb"
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(content)])
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": column}), file)
    first, bad, last = read_documents([str(file)], on_bad="reject")
    assert (first.text, last.text, last.place) == ("a", "b", "x.parquet:3")
    assert (bad.file, bad.line) == ("x.parquet", 2) and "invalid UTF-8" in bad.reason
    file.write_bytes(file.read_bytes()[:-40] + b"\xff" * 32 + file.read_bytes()[-8:])
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable Parquet file"):
        list(read_documents([str(file)]))


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "locked" / "b.txt", "b")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        expand_inputs([str(tmp_path)])


def test_text_file_that_is_not_utf8(tmp_path):
    with pytest.raises(ValueError, match=r"x\.txt:2: the line is invalid UTF-8"):
        list(read_documents([write(tmp_path / "x.txt", b"good\nbad \xff")]))


def test_saved_dataset(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "b"], "id": ["x", "y"], "n": [1, 2]})
    table.save_to_disk(tmp_path / "one")
    assert [(d.id, d.extra["n"]) for d in read_documents([str(tmp_path / "one")])] == [("x", 1), ("y", 2)]
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    assert len(list(read_documents([str(tmp_path / "two")]))) == 2
    assert [d.id for d in read_documents([f"{tmp_path / 'two'}:test"])] == ["y"]
    both = [f"{tmp_path / 'two'}:train", f"{tmp_path / 'two'}:test"]
    assert [item.name for item in expand_inputs(both)] == ["two:test", "two:train"]
    assert [d.place for d in read_documents(both)] == ["two:test:1", "two:train:1", "two:train:2"]
    with pytest.raises(ValueError, match="no split 'nope'; it has train, test"):
        list(read_documents([f"{tmp_path / 'two'}:nope"]))


def test_missing_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents([str(tmp_path / "none.jsonl")]))
    with pytest.raises(ValueError, match="no dataset that can be loaded"):
        list(read_documents(["nobody/nothing"]))
    with pytest.raises(ValueError, match="no known kind"):
        list(read_documents([write(tmp_path / "x.pdf", "x")]))
    with pytest.raises(ValueError, match="holds no document files"):
        list(read_documents([str(tmp_path)]))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents([f"{tmp_path / 'none'}:train"]))
    with pytest.raises(ValueError, match="no input was given"):
        list(read_documents([]))
    with pytest.raises(ValueError, match="an input is a dict; name a file"):
        list(read_documents([{"text": "x"}]))
    with pytest.raises(FileNotFoundError, match="no file is named as in"):
        list(read_documents([str(tmp_path / "*.jsonl")]))
    twice = write(tmp_path / "x.txt", "x")
    with pytest.raises(ValueError, match="given twice"):
        list(read_documents([twice, twice]))


def test_names_do_not_depend_on_where_the_files_are(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        write(tmp_path / folder / "a.txt", "a")
        write(tmp_path / folder / "sub" / "b.txt", "b")
    here = expand_inputs([str(tmp_path / "here/sub/b.txt"), str(tmp_path / "here/a.txt")])
    monkeypatch.chdir(tmp_path / "there")
    there = expand_inputs(["a.txt", "sub"])
    assert [split_input(item)[0] for item in here] == [split_input(item)[0] for item in there]


# Packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "aardvark"
    write(root / "__init__.py", '"""An animal."""\nraise RuntimeError("imported")')
    write(
        root / "dig.py",
        '"""Digging."""\nclass Hole(dict):\n    """A hole."""\n    def deepen(self, by: int = 1) -> None:\n'
        '        """Go\n        down."""\ndef hidden(): pass\n',
    )
    write(root / "broken.py", "def (")
    write(root / "tests" / "test_dig.py", '"""A test."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_package_is_read_and_never_imported(package):
    documents = list(package_documents(["aardvark"], min_chars=1))
    assert [d.id for d in documents] == ["aardvark", "aardvark.dig"]
    assert documents[1].text == (
        "aardvark.dig\n\nDigging.\n\nclass Hole(dict)\n\nA hole.\n\n"
        "def Hole.deepen(self, by: int=1) -> None\n\nGo\ndown."
    )
    assert [d.title for d in read_documents(["package:aardvark"])] == []  # all below 200 characters


def test_a_renamed_module_is_another_input(package):
    (before,) = (split_input(item)[0] for item in expand_inputs(["package:aardvark"]))
    (package / "dig.py").rename(package / "dug.py")
    (after,) = (split_input(item)[0] for item in expand_inputs(["package:aardvark"]))
    assert before["bytes"] == after["bytes"] and before["sha256"] != after["sha256"]


def test_package_that_is_not_there():
    with pytest.raises(ValueError, match="'no_such_thing' is not installed"):
        list(package_documents(["no_such_thing"]))


def test_transformers_has_one_document_per_family():
    modules = [name for name, _ in package_modules("transformers")]
    assert modules == sorted(modules) and "transformers.models.bert.modeling_bert" in modules
    bert = next(d for d in package_documents(["transformers"]) if d.id == "transformers.models.bert")
    assert "transformers.models.bert.modeling_bert" in bert.text and "class BertConfig" in bert.text
