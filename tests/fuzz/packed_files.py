"""Structure-aware fuzzing of the packed file: every mutated file loads and runs, or gives one clear ValueError.

    python -m tests.fuzz.packed_files --count 100000

Under a sanitizer (see docs/engine.md) a wild read or an undefined operation aborts the process; a hang is ended by an
alarm. The file that did it is kept.
"""

import argparse
import json
import math
import random
import signal
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdistill_core.engine.kernels import available_kernels
from bitdistill_core.engine.model import Engine
from bitdistill_core.packing import write_student
from tests.core.packed_files import (
    BASE3_BLOCK,
    BASE3_GROUPS,
    TOKENIZER,
    WHOLE_LINES,
    Header,
    join,
    reseal,
    split,
    student_arguments,
    tensor_names,
)

SECONDS_A_FILE = 60

Mutation = Callable[[random.Random, Header, bytearray], None]

STRANGE: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 16, 17, 31, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(2**63)),
    *(0.5, -0.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf, True, False, None, "", "full_attention", "\0"),
    *([], [1], [[]], {}, {"rope_type": "default"}, [None], "F32", "U8", "I64"),
]


def base_files(directory: Path) -> list[bytes]:
    """Small models of every kind: SubLN, biases, an untied head, sliding windows, Gemma, finer scales, base 3."""
    surgery = [{"subln": subln, "sub_norm_eps": 1e-6} for subln in ("none", "output", "all")]
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 4, "final_logit_softcapping": 30.0}
    variants: list[dict[str, Any]] = [
        {"bitdistill": surgery[1]},
        {"bitdistill": surgery[2], "tie_word_embeddings": False, "attention_bias": True},
        gemma | {"bitdistill": surgery[0], "layer_types": ["sliding_attention", "full_attention"]},
        {"bitdistill": surgery[2], "granularity": "row"},
        {"bitdistill": surgery[1], "granularity": "block", "attention_bias": True} | WHOLE_LINES,
        {"bitdistill": surgery[1], "encoding": "base3"} | BASE3_GROUPS,
        {"bitdistill": surgery[2], "encoding": "base3", "granularity": "block", "block_size": BASE3_BLOCK}
        | BASE3_GROUPS,
    ]
    files = []
    for number, changes in enumerate(variants):
        arguments = student_arguments(number, **changes) | {"tokenizer_json": TOKENIZER}
        write_student(directory / "base", **arguments)
        files.append((directory / "base").read_bytes())
    return files


def change_config(rng: random.Random, header: Header, data: bytearray) -> None:
    config = json.loads(header["__metadata__"]["config"])
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(config))
        value = config[key]
        if isinstance(value, dict) and value and rng.random() < 0.8:
            inner = rng.choice(list(value))
            if isinstance(value[inner], dict) and value[inner]:
                value[inner][rng.choice(list(value[inner]))] = rng.choice(STRANGE)
            else:
                value[inner] = rng.choice(STRANGE)
        elif isinstance(value, int) and rng.random() < 0.6:
            config[key] = value + rng.choice([-17, -16, -2, -1, 1, 2, 16, 64])
        elif rng.random() < 0.1:
            del config[key]
        else:
            config[key] = rng.choice(STRANGE)
    header["__metadata__"]["config"] = json.dumps(config)


def change_entry(rng: random.Random, header: Header, data: bytearray) -> None:
    entry = header[rng.choice(tensor_names(header))]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    if field != "dtype" and rng.random() < 0.7 and entry[field]:
        index = rng.randrange(len(entry[field]))
        entry[field][index] = rng.choice([*STRANGE, entry[field][index] + rng.choice([-64, -1, 1, 64])])
    elif rng.random() < 0.1:
        del entry[field]
    else:
        entry[field] = rng.choice(STRANGE)


def move_entries(rng: random.Random, header: Header, data: bytearray) -> None:
    first, second = rng.choice(tensor_names(header)), rng.choice(tensor_names(header))
    choice = rng.random()
    if choice < 0.4:
        header[first], header[second] = header[second], header[first]
    elif choice < 0.6:
        header[first] = dict(header[second])
    elif choice < 0.8:
        del header[first]
    else:
        header[first + rng.choice(["", ".bias", "x"])] = header.pop(second)


def change_metadata(rng: random.Random, header: Header, data: bytearray) -> None:
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    if rng.random() < 0.3:
        del metadata[key]
    else:
        metadata[key] = rng.choice([*STRANGE, "{", "[]", "null", '{"a":1}', "3", json.dumps(STRANGE[:5])])


def change_floats(rng: random.Random, header: Header, data: bytearray) -> None:
    names = [name for name in tensor_names(header) if header[name].get("dtype") == "F32"]
    begin, end = header[rng.choice(names)]["data_offsets"]
    values = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e38, -1e38, 1e-45, rng.gauss(0, 100)]
    for _ in range(rng.randint(1, 4)):
        at = begin + 4 * rng.randrange((end - begin) // 4)
        data[at : at + 4] = struct.pack("<f", rng.choice(values))


def change_bytes(rng: random.Random, header: Header, data: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 2, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)


def resize(rng: random.Random, header: Header, data: bytearray) -> None:
    if rng.random() < 0.7:
        del data[rng.randrange(len(data)) :]
    else:
        data.extend(rng.randbytes(rng.choice([1, 63, 64, 5000])))


MUTATIONS: list[Mutation] = [
    change_config,
    change_config,
    change_entry,
    move_entries,
    change_metadata,
    change_floats,
    change_bytes,
    resize,
]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One broken file. Most have right checksums; some are broken as raw bytes."""
    if rng.random() < 0.1:
        raw = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw) if rng.random() < 0.5 else 400)] = rng.randrange(256)
        return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
    header, data = split(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            rng.choice(MUTATIONS)(rng, header, data)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # an earlier mutation removed what this one changes
    if rng.random() < 0.9 and isinstance(header.get("__metadata__"), dict):
        reseal(header, data)
    return join(header, data, rng.choice([1, 4, 16]) if rng.random() < 0.02 else 0)


def run(path: Path, kernel: str) -> bool:
    """Loads and runs one file; False if it was refused with a clear error."""
    try:
        engine = Engine.load(path, num_threads=1, kernel=kernel)
        vocab_size = engine.config.vocab_size
        ids = [token % vocab_size for token in (1, 5, 0, 6, 3)][: engine.config.max_position_embeddings]
        with np.errstate(all="ignore"):
            engine.score_tokens([ids, ids[:1]], [0])
            if engine.config.max_position_embeddings >= 3:
                list(engine.generate_ids(ids[:1], 3))
            engine.logits(ids[:2])
    except ValueError as error:
        message = str(error)
        assert len(message) > 20, f"an error without an explanation: {message!r}"
        assert "\n" not in message.strip(), f"an error of several lines: {message!r}"
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, default=Path("crash.bitdistill"), help="where the current file is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bases = base_files(Path(directory))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is in
    loaded = 0
    for number in tqdm(range(arguments.seed, arguments.seed + arguments.count), unit="file", mininterval=1):
        rng = random.Random(number)
        arguments.kept.write_bytes(mutate(rng, rng.choice(bases)))
        signal.alarm(SECONDS_A_FILE)
        loaded += run(arguments.kept, rng.choice(available_kernels()))
    signal.alarm(0)
    arguments.kept.unlink()
    print(f"{arguments.count} files: {loaded} loaded and ran, {arguments.count - loaded} were refused, none crashed")


if __name__ == "__main__":
    main()
