"""The engine's threads: a forked child, a system that starts no more of them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitdistill_core.engine.model import Engine
from tests.core.classifiers import write_classifier

TASK = {"name": "m", "kind": "classification", "prompt": "{a}:", "label_words": ["bad", "good"]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_may_use_an_engine_and_free_it(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.bitdistill", TASK)
    engine = Engine.load(tmp_path / "model.bitdistill", num_threads=3)
    expected = engine.score(["a film"], [" bad", " good"])
    script = f"""
import os, sys, time
from bitdistill_core.engine.model import Engine
engine = Engine.load({str(tmp_path / "model.bitdistill")!r}, num_threads=3)
expected = engine.score(["a film"], [" bad", " good"])
time.sleep(0.2)  # the threads sleep by now
if os.fork() == 0:
    same = (engine.score(["a film"], [" bad", " good"]) == expected).all()
    del engine
    sys.exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "0\n"
    np.testing.assert_array_equal(engine.score(["a film"], [" bad", " good"]), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("own", ["thread", "engine"])
def test_a_forked_child_with_threads_of_its_own_frees_an_inherited_engine(tmp_path: Path, own: str) -> None:
    write_classifier(tmp_path / "model.bitdistill", TASK)
    script = f"""
import os, sys, threading
from bitdistill_core.engine.model import Engine
engine = Engine.load({str(tmp_path / "model.bitdistill")!r}, num_threads=2)
expected = engine.score(["a film"], [" bad", " good"])
if os.fork() == 0:
    if {own!r} == "thread":
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        del engine
        sys.exit(0)
    another = Engine.load({str(tmp_path / "model.bitdistill")!r}, num_threads=2)
    del engine
    same = (another.score(["a film"], [" bad", " good"]) == expected).all()
    del another
    sys.exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "0\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_before_the_first_token_generates_as_its_parent(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.bitdistill", TASK)
    script = f"""
import os, sys
from bitdistill_core.engine.model import Engine
engine = Engine.load({str(tmp_path / "model.bitdistill")!r}, num_threads=2)
if os.fork() == 0:
    print("".join(engine.generate("a film", 8)), flush=True)
    os._exit(0)
os.wait()
print("".join(engine.generate("a film", 8)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    child, parent = result.stdout.splitlines()
    assert child == parent != ""


def test_threads_that_cannot_be_started_are_one_error(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.bitdistill", TASK)
    limit = (3 << 30, resource.RLIM_INFINITY)  # each stack takes 8 MiB of it
    result = subprocess.run(
        [Path(sys.executable).with_name("bitdistill"), "classify", tmp_path, "x", "--num-threads", "1024"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's threads count too
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the system must be able to start every thread; got num_threads=1024, ")
