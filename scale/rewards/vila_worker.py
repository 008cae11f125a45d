"""VILA behind two pipes: runs in an environment with TensorFlow, and imports nothing of this package.

Started as `python vila_worker.py MODEL`. Every message is its length (4 bytes, big endian) and that many bytes. The
worker says `{"ready": true}`; then for `{"images": n}` and n messages of PNG or JPEG bytes it says `{"scores": [...]}`.
It ends when its input does. What it prints, and why it fails, goes to the standard error.
"""

import json
import os
import struct
import sys


def main(model):
    """Serve until the input ends; any failure ends the process, with a traceback."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # TensorFlow may print to the standard output, which is ours
    # the script's folder has modules that TensorFlow's own could be mistaken for
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    predict = load(model)
    write(answers, {"ready": True})
    for header in iter(lambda: read(sys.stdin.buffer), None):
        images = [read(sys.stdin.buffer) for _ in range(json.loads(header)["images"])]
        write(answers, {"scores": [predict(image) for image in images]})


def load(model):
    """The model, as a function of an encoded image -> its score in [0, 1]."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else it takes the GPU's whole memory
    import tensorflow as tf  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    import tensorflow_hub as hub  # pyright: ignore[reportMissingImports]

    loaded = hub.load(model)  # signatures die with the model that they belong to
    signature = loaded.signatures["serving_default"]
    return lambda image, keep=loaded: float(signature(tf.constant(image))["predictions"].numpy().reshape(-1)[0])


def read(stream):
    """The next message, or None at the end."""
    head = stream.read(4)
    return stream.read(struct.unpack(">I", head)[0]) if len(head) == 4 else None


def write(stream, message):
    """A message of JSON."""
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


if __name__ == "__main__":
    main(sys.argv[1])
