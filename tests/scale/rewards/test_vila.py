"""VILA: the process that scores, with a stand-in for TensorFlow, and every way in which such a process fails."""

import ast
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scale.rewards import vila
from scale.rewards.vila import WORKER, Vila

TENSORFLOW = """
import importlib.util
assert importlib.util.find_spec("colorfulness") is None, "the worker's folder is on the path"
def constant(data):
    assert isinstance(data, bytes)
    return data
"""
# the score is the mean of red, decoded from the PNG; the SavedModel says how to misbehave
HUB = """
import io, os, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
class Array:
    def __init__(self, value): self.value = value
    def numpy(self): return np.array([[self.value]], np.float32)
class Model:
    def __init__(self, mode):
        self.mode, self.seen = mode, 0
        self.signatures = {"serving_default": self.predict}
    def predict(self, data):
        self.seen += 1
        print("some progress bar")
        os.write(1, b"C++ says hello")
        if self.mode == "crash" and self.seen == 3: raise RuntimeError("out of memory")
        if self.mode == "exit" and self.seen == 3: os._exit(7)
        if self.mode == "hang" and self.seen == 3: time.sleep(60)
        if self.mode == "loud": sys.stderr.write("warning " * 50000 + chr(10))
        if self.mode == "nan": return {"predictions": Array(float("nan"))}
        return {"predictions": Array(np.asarray(Image.open(io.BytesIO(data)))[..., 0].mean() / 255)}
def load(address):
    mode = Path(address, "saved_model.pb").read_text()
    if mode == "broken": raise OSError("this SavedModel is damaged")
    if mode == "slow": time.sleep(60)
    return Model(mode)
"""
# talks as the worker does, up to the answer
IMPOSTOR = """#!{python}
import struct, sys
def read():
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack(">I", head)[0])
def write(data):
    sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)
    sys.stdout.buffer.flush()
write(b'{{"ready": true}}')
for _ in range(4): read()
{answer}
sys.stdin.buffer.read()
"""
PROMPTS = ["one", "two", "three"]


def images(n: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def expected(pictures: Tensor) -> Tensor:
    """The stand-in's score, on the paper's scale."""
    return 4 * (255 * pictures[:, 0]).round().div(255).mean((1, 2)) - 2


def model(folder: Path, mode: str = "well") -> Path:
    """A SavedModel that misbehaves in that way."""
    (folder / mode).mkdir()
    (folder / mode / "saved_model.pb").write_text(mode)
    return folder / mode


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def gone(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended and was waited for (else it would be a zombie, which still takes signals)."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return process.returncode is not None
    return False


@pytest.fixture(scope="module")
def tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name, text in (("tensorflow", TENSORFLOW), ("tensorflow_hub", HUB)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, tensorflow: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tensorflow))
    monkeypatch.delenv(vila.PYTHON, raising=False)


@pytest.fixture
def scorer(tmp_path: Path) -> Iterator[Vila]:
    scorer = Vila(model(tmp_path))
    yield scorer
    scorer.close()


def test_scores_come_back_in_order_on_the_papers_scale(scorer: Vila) -> None:
    """Each image has `4 r - 2` of its own r, over more than one batch, and images larger than a pipe holds arrive."""
    for pictures in (images(40), images(2, size=512), images(0)):
        scores = scorer.score(pictures, [""] * len(pictures))
        torch.testing.assert_close(scores, expected(pictures), rtol=0, atol=1e-5)
    assert not torch.allclose(expected(images(40)), expected(images(40)).flip(0), atol=1e-3)  # order could be seen


def test_its_files_are_the_folders_or_the_address(scorer: Vila) -> None:
    """All of a SavedModel, whose variables are in files of their own; of TF-hub, the address, which has a version."""
    folder = Path(vila._address(Path(str(scorer.files[0])).parent))
    assert [*scorer.files] == [folder / "saved_model.pb"]
    (folder / "variables").mkdir()
    (folder / "variables" / "variables.index").write_text("")
    assert [*vila._files(str(folder))] == [folder / "saved_model.pb", folder / "variables" / "variables.index"]
    assert [*vila._files(vila.HUB_ADDRESS)] == [vila.HUB_ADDRESS]


def test_the_scale_is_the_callers(tmp_path: Path) -> None:
    """With scale 1 and shift 0 the score and its range are VILA's own."""
    scorer = Vila(model(tmp_path), scale=1.0, shift=0.0)
    torch.testing.assert_close(scorer.score(images(), PROMPTS), (expected(images()) + 2) / 4, rtol=0, atol=1e-5)
    assert scorer.range == (0, 1)
    assert Vila(tmp_path / "well", scale=-1.0).range == (-3, -2)


def test_the_interpreter_is_the_argument_the_variable_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python=` goes before DBLEND_VILA_PYTHON, and an interpreter that is none is named with the remedy."""
    monkeypatch.setenv(vila.PYTHON, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none cannot be run .*No such file.*pip install tensorflow"):
        Vila(model(tmp_path))
    assert len(Vila(tmp_path / "well", python=sys.executable).score(images(), PROMPTS)) == 3


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A local path without saved_model.pb is a ValueError; an address is left to TF-hub."""
    with pytest.raises(ValueError, match=r"holds no saved_model\.pb; .*TF-hub's address"):
        Vila(tmp_path)
    assert vila._address(vila.HUB_ADDRESS) == vila.HUB_ADDRESS


def test_a_missing_tensorflow_is_told_in_one_line(tmp_path: Path) -> None:
    """An interpreter without TensorFlow: the remedy and the worker's own last line, in one line."""
    bare = script(tmp_path / "python", f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    with pytest.raises(ValueError, match=r"pip install tensorflow .*No module named 'tensorflow'$") as caught:
        Vila(model(tmp_path), python=bare)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_load_is_told(tmp_path: Path) -> None:
    """A failure while loading carries the library's own words."""
    with pytest.raises(ValueError, match=r"could not load .*this SavedModel is damaged$"):
        Vila(model(tmp_path, "broken"))


def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The time limit holds for the start."""
    with pytest.raises(ValueError, match=r"took longer than 0\.5 s"):
        Vila(model(tmp_path, "slow"), timeout=0.5)


@pytest.mark.parametrize(
    ("mode", "message"),
    [("crash", "it stopped; .*out of memory$"), ("exit", "it stopped"), ("hang", r"took longer than 0\.5 s")],
)
def test_a_failure_mid_way_is_told_and_leaves_no_process(tmp_path: Path, mode: str, message: str) -> None:
    """A worker that crashes, vanishes or hangs at the third image: one line, and no process or zombie is left."""
    scorer = Vila(model(tmp_path, mode))
    scorer.score(images(2), PROMPTS[:2])
    scorer.timeout = 0.5 if mode == "hang" else scorer.timeout
    with pytest.raises(ValueError, match=message) as caught:
        scorer.score(images(), PROMPTS)
    assert "\n" not in str(caught.value)
    assert gone(scorer._process)
    with pytest.raises(ValueError, match="the worker has ended; make the scorer anew"):
        scorer.score(images(), PROMPTS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("sys.stdout.buffer.write(b'Traceback: '); sys.stdout.flush()", "answered garbage"),
        ("write(b'not JSON')", "Expecting value"),
        ("write(bytes([200, 65]))", "codec can't decode"),
        ("write(b'[' * 100000)", "recursion"),
        ("write(b'[1, 2, 3]')", "no JSON object"),
        ("write(b'{}')", "answered None to 3 images"),
        ("""write(b'{"scores": [0.1, 0.2]}')""", r"answered \[0.1, 0.2\] to 3 images"),
        ("""write(b'{"scores": [0.1, 0.2, "a"]}')""", "to 3 images"),
        ("""write(b'{"scores": [0.1, 0.2, true]}')""", "to 3 images"),
        ("""write(b'{"scores": [0.1, 0.2, 1' + b'0' * 400 + b']}')""", "too large"),
        ("import os; os.write(1, b'abc'); os.close(1)", "it stopped"),
    ],
)
def test_garbage_is_no_score(tmp_path: Path, answer: str, message: str) -> None:
    """Whatever the worker answers but one number an image is a ValueError, and ends it."""
    python = script(tmp_path / "python", IMPOSTOR.format(python=sys.executable, answer=answer))
    scorer = Vila(model(tmp_path), python=python)
    with pytest.raises(ValueError, match=f"the worker failed while scoring: .*{message}"):
        scorer.score(images(), PROMPTS)
    assert gone(scorer._process)


def test_the_impostor_can_be_right(tmp_path: Path) -> None:
    """Negative control of the garbage: the same impostor with a good answer is believed."""
    answer = """write(b'{"scores": [0.5, 0, 1]}')"""
    python = script(tmp_path / "python", IMPOSTOR.format(python=sys.executable, answer=answer))
    scorer = Vila(model(tmp_path), python=python)
    assert scorer.score(images(), PROMPTS).tolist() == [0, -2, 2]


def test_a_score_that_is_nan_names_the_scorer(tmp_path: Path) -> None:
    """NaN from the model is refused as every scorer's is."""
    with pytest.raises(ValueError, match=r"the reward vila gave .*NaN"):
        Vila(model(tmp_path, "nan")).score(images(), PROMPTS)


def test_a_worker_that_says_much_is_heard(tmp_path: Path) -> None:
    """400 kB of warnings an image do not fill a pipe that nobody reads."""
    scorer = Vila(model(tmp_path, "loud"), timeout=20.0)
    torch.testing.assert_close(scorer.score(images(), PROMPTS), expected(images()), rtol=0, atol=1e-5)
    scorer.close()
    assert len(scorer._said) <= 20


def test_the_worker_ends_with_its_scorer(tmp_path: Path) -> None:
    """`close`, twice, and the garbage collector both end the worker, which leaves with 0."""
    first, second = Vila(model(tmp_path)), Vila(tmp_path / "well")
    processes = first._process, second._process
    first.close()
    first.close()
    del second
    gc.collect()
    for process in processes:
        assert gone(process)
        assert process.returncode == 0


def test_a_stubborn_worker_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper whose child ignores the end of its input is killed, and the child with it."""
    monkeypatch.setattr(vila, "PATIENCE", 0.2)
    lines = (f'"{sys.executable}" "$@"', f"sleep 60 & echo $! > {tmp_path}/child", "wait")
    scorer = Vila(model(tmp_path), python=script(tmp_path / "python", "#!/bin/sh\n" + "\n".join(lines)), timeout=20.0)
    scorer.close()
    assert gone(scorer._process)
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 5
    while time.monotonic() < end and not _is_dead(child):
        time.sleep(0.02)
    assert _is_dead(child)


def _is_dead(pid: int) -> bool:
    """Gone, or a zombie whose adoptive parent has not looked yet."""
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_worker_stands_alone() -> None:
    """The worker imports the standard library and TensorFlow alone, for it runs where nothing of ours is."""
    tree = ast.parse(WORKER.read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names - set(sys.stdlib_module_names) == {"tensorflow", "tensorflow_hub"}
    top = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    assert top <= set(sys.stdlib_module_names)
    assert not re.search(r"\bpickle\b|\beval\(", WORKER.read_text())
