"""VILA: the aesthetic score of an image (Ke et al. 2023, "VILA: Learning image aesthetics from user comments")."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from scale.rewards.protocol import Images, Scorer

HUB_ADDRESS = "https://tfhub.dev/google/vila/image/1"
WORKER = Path(__file__).with_name("vila_worker.py")
PYTHON = "DBLEND_VILA_PYTHON"  # the environment variable that names the interpreter
LONGEST_ANSWER = 1_000_000  # bytes
PATIENCE = 5.0  # seconds in which a worker should end by itself
REMEDY = (
    "give TensorFlow an environment of its own (`pip install tensorflow tensorflow_hub`) and name its interpreter by "
    f"python=... or {PYTHON}; model=... is TF-hub's address or the folder of the unpacked SavedModel"
)


class Vila(Scorer):
    """`scale r + shift` of VILA's score r in [0, 1], by default the paper's `4 r - 2`; the prompts play no part.

    The model is a TensorFlow graph. It runs in a process of its own under `python`, the interpreter of an environment
    with `tensorflow` and `tensorflow_hub` (default: what DBLEND_VILA_PYTHON names, else this interpreter), so that
    TensorFlow never shares a process with torch. Images go there as PNG, rounded to 8 bits; no gradients come back.
    `timeout` (seconds) bounds the start, the download included, and each batch. The process ends with `close()`, with
    the scorer, or with this process, whichever comes first; a failed worker is not started again.

    Raises:
        ValueError: an interpreter or a model that cannot be started; from `score`, a worker that stopped, took too
            long or answered anything but one number an image. The message ends with the worker's last line.
    """

    name = "vila"
    differentiable = False
    batch_size = 16
    runs_on = "anywhere"

    def __init__(
        self,
        model: str | Path = HUB_ADDRESS,
        python: str | Path | None = None,
        *,
        scale: float = 4.0,
        shift: float = -2.0,
        timeout: float = 600.0,
    ) -> None:
        self.scale, self.shift, self.timeout = scale, shift, timeout
        low, high = sorted((shift, scale + shift))
        self.range = (low, high)
        interpreter, address = str(python or os.environ.get(PYTHON) or sys.executable), _address(model)
        self.files = _files(address)
        try:
            self._process = _start(interpreter, address)
        except OSError as error:
            raise ValueError(f"vila: {interpreter} cannot be run ({error.strerror}); {REMEDY}") from error
        self._said: deque[bytes] = deque(maxlen=20)
        listener = threading.Thread(target=_listen, args=(self._process, self._said), daemon=True)
        listener.start()
        self._end = weakref.finalize(self, _stop, self._process, listener)
        with self._exchange(f"{interpreter} could not load {address}", REMEDY):
            if self._receive() != {"ready": True}:
                raise ValueError("it did not say that it is ready")

    def close(self) -> None:
        """End the worker; a second call does nothing."""
        self._end()

    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        with self._exchange("the worker failed while scoring", "make the scorer anew to start it again"):
            self._send(json.dumps({"images": len(images)}).encode())
            for picture in (255 * images.detach().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy():
                self._send(_png(picture))
            raw = self._receive().get("scores")
            if not isinstance(raw, list) or len(raw) != len(images) or not all(type(r) in (int, float) for r in raw):
                raise ValueError(f"it answered {str(raw)[:80]} to {len(images)} images")
            scores = [self.scale * float(r) + self.shift for r in raw]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    @contextmanager
    def _exchange(self, what: str, remedy: str) -> Iterator[None]:
        """Within it the worker has `timeout` seconds; whatever goes wrong ends it, and is told in one line."""
        if not self._end.alive:
            raise ValueError(f"vila: the worker has ended; {remedy}")
        late = threading.Event()
        # a killed worker closes its pipes, which wakes every read and write that waits for it
        clock = threading.Timer(self.timeout, lambda: (late.set(), _kill(self._process)))
        clock.start()
        try:
            yield
        except (OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
            clock.cancel()
            self.close()
            reason = f"it took longer than {self.timeout:g} s" if late.is_set() else str(error)
            said = [line for line in (bytes(line).decode(errors="replace").strip() for line in self._said) if line]
            last = f", and its last line was: {said[-1][:300]}" if said else ""
            raise ValueError(f"vila: {what}: {reason}; {remedy}{last}") from error
        except BaseException:  # an interrupt leaves half a message in the pipes
            self.close()
            raise
        finally:
            clock.cancel()

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack(">I", len(message)) + message)
        self._process.stdin.flush()

    def _receive(self) -> dict:
        (length,) = struct.unpack(">I", self._read(4))
        if length > LONGEST_ANSWER:
            raise ValueError(f"it answered garbage, {length} bytes of it")
        answer = json.loads(self._read(length))
        if not isinstance(answer, dict):
            raise ValueError(f"it answered {str(answer)[:80]}, no JSON object")
        return answer

    def _read(self, length: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(length)
        if len(data) < length:
            raise EOFError("it stopped")
        return data


def _address(model: str | Path) -> str:
    """TF-hub's address as it is, a folder as an absolute path; ValueError for a folder without a SavedModel."""
    if "://" in str(model):
        return str(model)
    folder = Path(model).expanduser().resolve()
    if not (folder / "saved_model.pb").is_file():
        raise ValueError(f"vila: {folder} holds no saved_model.pb; {REMEDY}")
    return str(folder)


def _files(address: str) -> tuple[Path | str, ...]:
    """All files of a folder; TF-hub's address itself, which names a version."""
    if "://" in address:
        return (address,)
    return tuple(path for path in sorted(Path(address).rglob("*")) if path.is_file())


def _start(python: str, model: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    # a session of its own: Ctrl-C is ours to handle, and a wrapper's children can be ended with it
    return subprocess.Popen([python, str(WORKER), model], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def _listen(process: subprocess.Popen[bytes], said: deque[bytes]) -> None:
    """Keep the last lines of what the worker says, lest it wait for a reader."""
    assert process.stderr is not None
    with process.stderr:
        said.extend(process.stderr)


def _stop(process: subprocess.Popen[bytes], listener: threading.Thread) -> None:
    """Let the worker end by itself, or end it; wait for it, and close what led to it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it is gone, and what was left for it with it
        process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.wait()
    listener.join(PATIENCE)
    process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the worker and what it started. Nobody has waited for it yet, so its number is no other's."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
