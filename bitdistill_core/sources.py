"""Where rows come from: one file with a `split` column, a directory of SPLIT files, or the hub.

Files are parquet, JSON lines or CSV. The hub needs `datasets`, imported when it is used.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bitdistill_core.errors import one_line

csv.field_size_limit(2**31 - 1)  # long texts are texts

Source = Path | str  # a local file or directory, or a hub id
ENDINGS = (".parquet", ".jsonl", ".csv")


def locate(name: str, config: str | None, data_root: str | None) -> Source:
    """The local path of a data set, or its hub id where it has none.

    Without `data_root` a name that exists is a path and anything else a hub id, of a branch, tag or commit where it
    reads ID@REVISION. With it the data set must lie below,
    as files: DATA_ROOT/NAME, DATA_ROOT/BASENAME/CONFIG or DATA_ROOT/BASENAME (glue for the hub id nyu-mll/glue); a
    name of a file, data/demo/corpus.parquet, may also exist as it is.

    Raises:
        ValueError: not found below data_root, or a path that does not exist.
    """
    if data_root is None:
        if Path(name).exists():
            return Path(name)
        if name.endswith(ENDINGS) or name.startswith((".", "/", "~")) or hub_parts(name)[0].count("/") != 1:
            raise ValueError(f"no data at path={name}; give a {_ENDINGS} file, a directory of such files or a hub id")
        return name
    if not name.endswith(ENDINGS):
        name, _ = hub_parts(name)
    base = Path(data_root) / name.rsplit("/", 1)[-1]
    candidates = [Path(data_root) / name, *([base / config] if config else []), base]
    if name.endswith(ENDINGS):
        candidates.append(Path(name))
    for path in candidates:
        if path.is_file() or (path.is_dir() and _files(path, "")):
            return path
    tried = ", ".join(str(path) for path in candidates)
    raise ValueError(f"data_root={data_root} holds no data for {name}; tried {tried}")


def hub_parts(name: str) -> tuple[str, str | None]:
    """The repository of a hub id, and the branch, tag or commit behind its @, if it names one."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def split_files(source: Path, split: str | None) -> list[Path]:
    """The files of a split: SPLIT.ENDING or SPLIT-*.ENDING in a directory, or the file itself.

    Split None means the training files of a directory, or all its files where none is called train.
    """
    if source.is_file():
        return [source]
    if split is None:
        files = _files(source, "train")
        if not files:
            return _files(source, "")
    else:
        files = [path for path in _files(source, split) if path.stem == split or path.name.startswith(f"{split}-")]
    names = ", ".join(path.name for path in files or _files(source, ""))
    if not files:
        raise ValueError(f"no file of split={split} in path={source}; it holds {names}")
    if len({path.suffix for path in files}) > 1:  # most likely the same rows twice
        raise ValueError(f"the files of a split must be of one kind; got {names} in path={source}; keep one kind")
    return files


def read_rows(source: Source, split: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a split as mappings."""
    if isinstance(source, str):
        yield from _load_hub(source, config, split, streaming=False)
    else:
        yield from _iter_files(source, split)


class Corpus:
    """The non-empty documents of a corpus, in order. A hub corpus is streamed.

    Args:
        limit: documents at most; 0: all.
        place: what `place` said, to go on from there.
    """

    def __init__(self, source: Source, column: str, *, limit: int, place: Mapping[str, Any] | None = None) -> None:
        self.column, self.limit = column, limit
        self.num_documents = 0 if place is None else int(place["documents"])
        self._stream: Any = None
        self._texts: Iterator[str]
        if isinstance(source, str):
            self._stream = _load_hub(source, None, "train", streaming=True)
            if place is not None:
                self._stream.load_state_dict(place["stream"])
            self._texts = self._non_empty(_named_errors(self._stream, source))
        else:
            self._texts = islice(self._non_empty(_iter_files(source, None)), self.num_documents, None)

    def __iter__(self) -> Iterator[str]:
        while not self.limit or self.num_documents < self.limit:
            text = next(self._texts, None)
            if text is None:
                return
            self.num_documents += 1
            yield text

    def place(self) -> dict[str, Any]:
        """Behind the document that was given last, as JSON holds it."""
        stream = {} if self._stream is None else {"stream": self._stream.state_dict()}
        return {"documents": self.num_documents, **stream}

    def _non_empty(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for row in rows:
            if self.column not in row:
                raise ValueError(
                    f"the corpus has no column={self.column}; its columns are {', '.join(row)}; set data.corpus_column"
                )
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"a corpus holds texts; got {self.column}={text!r}; set data.corpus_column to another column"
                )
            if text and text.strip():
                try:
                    text.encode()
                except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
                    raise ValueError(
                        f"a corpus holds texts of whole characters; got {self.column}={text[:40]!r} behind "
                        f"num_documents={self.num_documents}: {error}; drop the row"
                    ) from None
                yield text


def _files(directory: Path, prefix: str) -> list[Path]:
    return sorted(p for p in directory.glob(f"{prefix}*") if p.suffix in ENDINGS)


def _iter_files(source: Path, split: str | None) -> Iterator[Mapping[str, Any]]:
    if split is None or not source.is_file():
        for path in split_files(source, split):
            yield from _iter_file(path)
        return
    for row in _iter_file(source):
        if "split" not in row:  # otherwise a model would be tested on the rows that it learned from
            raise ValueError(
                f"a single data file needs a column split, which says what each row is for; got path={source} with "
                f"columns {', '.join(row)}; add it, or give a directory of files SPLIT{ENDINGS[0]}, one for each split"
            )
        if row["split"] == split:
            yield row


def _iter_file(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1024):
                    yield from batch.to_pylist()
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _json_object(line, f"line={number} in path={path}")
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:  # Excel writes a byte order mark
                reader = csv.DictReader(lines)
                for row in reader:
                    if None in row or None in row.values():
                        raise ValueError(
                            f"a row must have as many values as there are columns; got line={reader.line_num} in "
                            f"path={path}, columns={', '.join(reader.fieldnames or [])}; quote texts that hold a comma"
                        )
                    yield row
        else:
            raise ValueError(f"a data file ends in {_ENDINGS}; got path={path}")
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"unreadable data file path={path}: {one_line(error)}") from None


_ENDINGS = ", ".join(ENDINGS)


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and a thousand brackets
        raise ValueError(f"unreadable data file, {place}: {one_line(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a line must be one JSON object; got {place}")
    return row


def _load_hub(name: str, config: str | None, split: str, *, streaming: bool) -> Any:
    import datasets

    repository, revision = hub_parts(name)
    try:
        return datasets.load_dataset(repository, config, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # the hub client raises many types, also for "no network"
        raise ValueError(
            f"cannot load split={split} of data set {name} ({config}) from the hub: {one_line(error)}; "
            "check the name and the network, or give --data-root DIR with the files"
        ) from None


def _named_errors(stream: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a stream; whatever the hub client raises on the way as one ValueError."""
    try:
        yield from stream
    except Exception as error:
        raise ValueError(
            f"the stream of data set {name} from the hub broke off: {one_line(error)}; run the same command to go on"
        ) from None
