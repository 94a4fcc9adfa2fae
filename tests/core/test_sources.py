"""The corpus as a stream that breaks off and goes on; the stream of a hub data set is one of local files here."""

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
from bitdistill_core.sources import Corpus
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
