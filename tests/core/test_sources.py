"""Data files; the corpus as a stream that breaks off and goes on, where a hub data set is one of local files."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitdistill_core import sources
from bitdistill_core.config import Params
from bitdistill_core.sources import Corpus, locate, read_rows, split_files
from bitdistill_core.stages import data

TEXTS = [f"text {number}" for number in range(20)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files of a corpus, with documents that are empty."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, texts in enumerate([[*TEXTS[:7], ""], ["  ", *TEXTS[7:12], None], TEXTS[12:]]):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / f"{number}.parquet")
    return folder


@pytest.fixture
def hub(files: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id whose stream is that of the files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files.parent / "cache"))
    paths = sorted(map(str, files.glob("*.parquet")))
    stream = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    monkeypatch.setattr(sources, "_load_hub", lambda *_, **__: stream)
    return "someone/texts"


@pytest.mark.parametrize("is_hub", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 7, 13, 20])
def test_a_corpus_goes_on_where_it_was_left(files: Path, hub: str, is_hub: bool, taken: int) -> None:
    source = hub if is_hub else files
    first = Corpus(source, "text", limit=0)
    begun = list(islice(first, taken))
    place = first.place()
    assert begun == TEXTS[:taken]
    assert place["documents"] == taken
    rest = Corpus(source, "text", limit=0, place=place)
    assert [*begun, *rest] == TEXTS
    assert rest.num_documents == 20
    assert list(Corpus(source, "text", limit=15, place=place)) == TEXTS[taken:15]


def test_a_corpus_that_breaks_off_keeps_its_whole_shards(
    hub: str, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DOCUMENTS_A_SHARD", 6)
    whole = sources._named_errors
    read: list[str] = []

    def breaking(stream: Any, name: str) -> Iterator[Mapping[str, Any]]:
        def rows() -> Iterator[Mapping[str, Any]]:
            for row in stream:
                if row["text"] == "text 14":
                    raise ConnectionError("reset by peer")
                read.append(row["text"])
                yield row

        return whole(rows(), name)

    config = tiny_params.data.model_copy(update={"corpus_column": "text", "corpus_documents": 0})
    out = tmp_path / "corpus-out"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_named_errors", breaking)
        with pytest.raises(ValueError, match="data set someone/texts from the hub broke off: reset by peer"):
            data._write_corpus(hub, config, tmp_path, out)
    assert not out.exists()
    assert read[-1] == "text 13"
    assert data._write_corpus(hub, config, tmp_path, out) == 20
    shards = [pq.read_table(path)["text"].to_pylist() for path in sorted(out.iterdir())]
    assert shards == [TEXTS[:6], TEXTS[6:12], TEXTS[12:18], TEXTS[18:]]
    assert not (tmp_path / "corpus-place.jsonl").exists()


def test_a_corpus_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.parquet"
    pq.write_table(pa.table({"n": [1, 2]}), path)
    with pytest.raises(ValueError, match="a corpus holds texts; got n=1; "):
        list(Corpus(path, "n", limit=0))


def test_half_a_character_in_a_corpus_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"texts of whole characters; got text='cut \\ud83d' behind num_documents=1: "):
        list(Corpus(path, "text", limit=0))


def test_parquet_sources(tmp_path: Path) -> None:
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    pq.write_table(pa.table({"sentence": ["x"], "label": [1]}), tmp_path / "glue" / "sst2" / "validation-0.parquet")
    source = locate("nyu-mll/glue", "sst2", str(tmp_path))
    assert list(read_rows(source, "validation", "sst2")) == [{"sentence": "x", "label": 1}]
    with pytest.raises(ValueError, match=r"no file of split=train .* holds validation-0\.parquet"):
        list(read_rows(source, "train", "sst2"))
    with pytest.raises(ValueError, match="holds no data for nyu-mll/other; tried"):
        locate("nyu-mll/other", None, str(tmp_path))
    assert locate("nyu-mll/glue", "sst2", None) == "nyu-mll/glue"
    assert locate("nyu-mll/glue@main", "sst2", str(tmp_path)) == source
    assert locate("nyu-mll/glue@refs/pr/1", "sst2", None) == "nyu-mll/glue@refs/pr/1"
    (tmp_path / "c@2.jsonl").write_text("{}")
    assert locate("c@2.jsonl", None, str(tmp_path)) == tmp_path / "c@2.jsonl"
    file = tmp_path / "glue" / "sst2" / "validation-0.parquet"
    assert locate(str(file), None, str(tmp_path / "glue")) == file


def test_a_split_twice_is_an_error(tmp_path: Path) -> None:
    for name in ("train.csv", "train.jsonl", "validation.csv"):
        (tmp_path / name).write_text("")
    for split in ("train", None):
        with pytest.raises(ValueError, match=r"files of a split must be of one kind; got train\.csv, train\.jsonl"):
            split_files(tmp_path, split)
    assert split_files(tmp_path, "validation") == [tmp_path / "validation.csv"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", '{"text": "a, b", "label": 1, "split": "train"}\n\n{"text": "c", "label": 0, "split": "test"}\n'),
        ("d.csv", 'text,label,split\n"a, b",1,train\nc,0,test\n'),
        ("bom.jsonl", '\ufeff{"text": "a, b", "label": 1, "split": "train"}\n'),
        ("bom.csv", '\ufefftext,label,split\n"a, b",1,train\n'),
    ],
)
def test_one_file_with_a_split_column(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (row,) = read_rows(tmp_path / name, "train", None)
    assert {**row, "label": int(row["label"])} == {"text": "a, b", "label": 1, "split": "train"}


def test_one_file_without_a_split_column_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(ValueError, match=r"needs a column split.* with columns text, label; add it, or give a dir"):
        list(read_rows(tmp_path / "d.jsonl", "test", None))


def test_texts_of_a_csv_file_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n007,1\n--5,0\n,1\n")
    assert [row["text"] for row in read_rows(tmp_path, "train", None)] == ["007", "--5", ""]


@pytest.mark.parametrize("line", ["a, with a comma,1", "lonely"])
def test_a_ragged_csv_file_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.csv").write_text(f"text,label\nfine,1\n{line}\n")
    with pytest.raises(ValueError, match=r"as many values as there are columns; got line=3 in .*columns=text, label"):
        list(read_rows(tmp_path, "train", None))


def test_unreadable_data_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{no json")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "d.jsonl").write_text('{"split": "train", "a": ' + 5000 * "1" + "}")
    (tmp_path / "e.jsonl").write_text(100_000 * "[")
    pq.write_table(
        pa.table({"split": ["train"] * 500, "a": [f"text {i % 7}" for i in range(500)]}), tmp_path / "f.parquet"
    )
    broken = bytearray((tmp_path / "f.parquet").read_bytes())
    broken[20:200] = bytes(range(180))
    (tmp_path / "f.parquet").write_bytes(broken)
    for name in ("a.jsonl", "b.parquet", "d.jsonl", "e.jsonl", "f.parquet"):
        with pytest.raises(ValueError, match=f"unreadable data file.*path=.*{name}"):
            list(read_rows(tmp_path / name, "train", None))
    (tmp_path / "long.csv").write_text(f"split,a\ntrain,{'x' * 200_000}\n")
    assert [len(row["a"]) for row in read_rows(tmp_path / "long.csv", "train", None)] == [200_000]
    (tmp_path / "c.jsonl").write_text('{"split": "train"}\n[1]\n')
    with pytest.raises(ValueError, match="a line must be one JSON object; got line=2"):
        list(read_rows(tmp_path / "c.jsonl", "train", None))
    with pytest.raises(ValueError, match=r"give a \.parquet, \.jsonl, \.csv file"):
        locate(str(tmp_path / "none.parquet"), None, None)
