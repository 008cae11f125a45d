"""The command `dblend`: quick help, and one line with exit code 2 on anything wrong."""

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import scale.generate
from scale.adapters import FILE_NAMES
from scale.cli import main
from tests.scale import tiny

SAFE, PICKLE = FILE_NAMES
# the scorers that need no shipped weights
SCORERS = {name: path for name, path in scale.generate.SCORERS.items() if name != "alignment"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, good adapters `a` and `b`, and bad ones of every kind."""
    folder = tmp_path_factory.mktemp("files")
    tiny.sd().save_pretrained(folder / "model")
    good = load_file(tiny.save_lora(tiny.sd, folder / "a", 1) / SAFE)
    tiny.save_lora(tiny.sd, folder / "b", 2)
    tiny.save_lora(tiny.sdxl, folder / "other-base", 3, ("to_k",))
    first, *_ = good
    bad = {
        "no-layer": {"mean": torch.zeros(3)},
        "nan": good | {first: good[first] * torch.nan},
        "dora": good | {"unet.x.lora_magnitude_vector": torch.zeros(4)},
        "text": good | {"text_encoder.x.lora_A.weight": torch.zeros(4)},
    }
    for name, table in bad.items():
        save_file(table, folder / f"{name}.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "a" / SAFE).read_bytes()[:-9])
    hostile = pickle.dumps({"unet.x.lora_A.weight": Bomb(folder / "sentinel")})
    (folder / "hostile.bin").write_bytes(hostile)
    (folder / "hostile.safetensors").write_bytes(hostile)
    (folder / "empty").mkdir()
    (folder / "broken-model").mkdir()
    (folder / "broken-model" / "model_index.json").write_text("{")
    (folder / "list.json").write_text('["a red circle", 3]')
    (folder / "half.json").write_text('["a red circle"')
    (folder / "blank.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("grün".encode("latin-1"))
    (folder / "good.txt").write_text("a red circle\n")
    return folder


class Bomb:
    """Unpickling one of these makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def command(files: Path, line: str) -> list[str]:
    """A command line; `@x` stands for the file x."""
    return [word.replace("@", f"{files}{os.sep}") for word in line.split()]


def assert_refused(captured: pytest.CaptureFixture[str], code: object, reason: str) -> None:
    """Exit code 2, nothing on standard output, one line on standard error that names the reason."""
    output = captured.readouterr()
    assert code == 2
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("dblend: ")
    assert reason in output.err


MODEL = "--model @model --steps 1"
BOTH = "--adapter a=@a b=@b"
ASK = "generate --prompt red"
REFUSED = {
    "no command": ("", "Missing subcommand"),
    "unknown command": ("paint", "paint"),
    "unknown flag": (f"{ASK} --weights jpeg=1 --colour red", "--colour"),
    "no number": (f"{ASK} --weights jpeg=1 --seed one", "--seed"),
    "flag without value": ("generate --prompt", "--prompt"),
    "no prompt": ("generate --weights jpeg=1", "either --prompt TEXT or --prompt-file FILE"),
    "two prompts": (f"{ASK} --prompt-file @good.txt --weights jpeg=1", "either --prompt TEXT or --prompt-file FILE"),
    "prompt file missing": ("generate --prompt-file @none.json --weights jpeg=1", "cannot read the prompt file"),
    "prompt file a folder": ("generate --prompt-file @empty --weights jpeg=1", "cannot read the prompt file"),
    "prompt file cut": ("generate --prompt-file @half.json --weights jpeg=1", "no JSON"),
    "prompt file of others": ("generate --prompt-file @list.json --weights jpeg=1", "JSON list of strings"),
    "prompt file blank": ("generate --prompt-file @blank.txt --weights jpeg=1", "holds no prompt"),
    "prompt file not UTF-8": ("generate --prompt-file @latin.txt --weights jpeg=1", "cannot read the prompt file"),
    "no weights": (f"{ASK} {MODEL} {BOTH}", "needs weights"),
    "empty weights": (f"{ASK} {MODEL} {BOTH} --weights", "needs weights"),
    "negative weight": (f"{ASK} {MODEL} {BOTH} --weights a=-0.5 b=1.5", '"a" is negative'),
    "NaN weight": (f"{ASK} {MODEL} {BOTH} --weights a=nan b=1", "'a' must be finite"),
    "infinite weight": (f"{ASK} {MODEL} {BOTH} --weights a=inf b=1", "'a' must be finite"),
    "unknown weight": (f"{ASK} {MODEL} {BOTH} --weights a=0.5 c=0.5", "no adapter for the weight of c"),
    "sum": (f"{ASK} {MODEL} {BOTH} --weights a=0.5 b=0.4", "must sum to 1"),
    "weight twice": (f"{ASK} {MODEL} {BOTH} --weights a=0.5 a=0.5", "'a' is given twice"),
    "weight twice by two flags": (f"{ASK} {MODEL} {BOTH} --weights a=0.5 --weights a=0.5", "'a' is given twice"),
    "weight without =": (f"{ASK} {MODEL} {BOTH} --weights a", "'a' is not NAME=VALUE"),
    "weight of base": (f"{ASK} {MODEL} --adapter base=@a --weights base=1", '"base" takes no weight'),
    "adapter twice": (f"{ASK} {MODEL} --adapter a=@a a=@b --weights a=1", "'a' is given twice"),
    "adapter without =": (f"{ASK} {MODEL} --adapter @a --weights a=1", "is not NAME=VALUE"),
    "dotted adapter": (f"{ASK} {MODEL} --adapter a.b=@a --weights a.b=1", "without dots"),
    "lambda negative": (f"{ASK} {MODEL} {BOTH} --weights a=1 --kl-scale -1", "kl_scale must be at least 0"),
    "lambda infinite": (f"{ASK} {MODEL} {BOTH} --weights a=1 --kl-scale inf", "kl_scale must be finite"),
    "lambda NaN": (f"{ASK} {MODEL} {BOTH} --weights a=1 --kl-scale nan", "kl_scale must be finite"),
    "lambda negative, base": (f"{ASK} --model @model --method base --kl-scale -1", "kl_scale must be at least 0"),
    "no finite image": (f"{ASK} --model @model --method base --steps 2 --guidance 1e38", "not finite"),
    "method": (f"{ASK} {MODEL} {BOTH} --weights a=1 --method soup", "unknown method 'soup'"),
    "kla with two": (f"{ASK} {MODEL} {BOTH} --weights a=.5 b=.5 --method kla", "kla blends the base with one adapter"),
    "LS with lambda above 1": (f"{ASK} {MODEL} {BOTH} --weights a=1 --method mpa-ls --kl-scale 1.2", "use mpa"),
    "steps 0": (f"{ASK} --weights jpeg=1 --steps 0", "steps must be at least 1"),
    "too many steps": (f"{ASK} --model @model --method base --steps 2000", "1000"),
    "num 0": (f"{ASK} --weights jpeg=1 --num 0", "num must be at least 1"),
    "negative seed": (f"{ASK} --weights jpeg=1 --seed -1", "seeds must lie in"),
    "huge seed": (f"{ASK} --weights jpeg=1 --seed 99999999999999999999", "seeds must lie in"),
    "batch 0": (f"{ASK} --weights jpeg=1 --batch-size 0", "batch_size must be at least 1"),
    "model missing": (f"{ASK} --model @none --method base", "no model at"),
    "model a file": (f"{ASK} --model @good.txt --method base", "is no diffusers model"),
    "model an empty folder": (f"{ASK} --model @empty --method base", "is no diffusers model"),
    "model broken": (f"{ASK} --model @broken-model --method base", "cannot load the model"),
    "model no folder, no id": (f"{ASK} --model nowhere --method base", "no model at nowhere"),
    "out a file": (f"{ASK} --model @model --method base --out @good.txt", "is a file"),
    "out inside a file": (f"{ASK} --model @model --method base --out @good.txt/x", "Not a directory"),
    "adapter missing": (f"{ASK} {MODEL} --adapter x=@none --weights x=1", "no adapter at"),
    "adapter an empty folder": (f"{ASK} {MODEL} --adapter x=@empty --weights x=1", "holds none of"),
    "adapter of no layer": (f"{ASK} {MODEL} --adapter x=@no-layer.safetensors --weights x=1", "changes no layer"),
    "adapter of another base": (f"{ASK} {MODEL} --adapter x=@other-base --weights x=1", "wrong base model"),
    "adapter with NaN": (f"{ASK} {MODEL} --adapter x=@nan.safetensors --weights x=1", "NaN or infinite"),
    "adapter DoRA": (f"{ASK} {MODEL} --adapter x=@dora.safetensors --weights x=1", "DoRA"),
    "adapter of text": (f"{ASK} {MODEL} --adapter x=@text.safetensors --weights x=1", "text-encoder"),
    "adapter cut": (f"{ASK} {MODEL} --adapter x=@cut.safetensors --weights x=1", "no readable file of weights"),
    "adapter hostile": (f"{ASK} {MODEL} --adapter x=@hostile.bin --weights x=1", "refused"),
    "adapter hostile, renamed": (f"{ASK} {MODEL} --adapter x=@hostile.safetensors --weights x=1", "no readable"),
    "demo into a file": ("demo --out @good.txt", "is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_code_2(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Whatever is wrong: exit code 2, one line that names it, no traceback, no file, no foreign code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale.generate, "SCORERS", SCORERS)
    line, reason = REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        main(command(files, line))
    assert_refused(capsys, ended.value.code, reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (files / "sentinel").exists()


def test_good_weights_pass(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 + 0.2 + 0.1 misses 1 by rounding and passes; repeated flags add up instead of dropping the first."""
    monkeypatch.setattr(scale.generate, "SCORERS", SCORERS)
    flags = "--adapter a=@a --adapter b=@b c=@a/pytorch_lora_weights.safetensors --weights a=0.7 b=0.2 --weights c=0.1"
    main(command(files, f"{ASK} {MODEL} {flags} --num 2 --seed 3 --kl-scale 1.2 --out {tmp_path / 'out'}"))
    output = capsys.readouterr()
    assert output.err == ""
    assert str(tmp_path / "out" / "generation.json") in output.out
    record = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert record["weights"] == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1})
    assert record["kl_scale"] == 1.2
    assert [(image["prompt"], image["seed"]) for image in record["images"]] == [("red", 3), ("red", 4)]
    assert [path.name for path in sorted((tmp_path / "out").glob("*.png"))] == ["00000-3.png", "00000-4.png"]


def test_an_interrupt_is_one_line_and_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends a command without a traceback."""

    def interrupted(request: scale.generate.Request) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(scale.generate, "generate", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([*ASK.split(), "--method", "base"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "dblend: interrupted\n"


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A real process, as a user starts it, in which no library has been told to be quiet."""
    loud = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in loud}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_bad_input_in_a_real_process(root: Path, files: Path, tmp_path: Path) -> None:
    """The libraries' bars and advice are silent too: one line on standard error, after the model was loaded."""
    line = f"{ASK} {MODEL} --adapter a=@a x=@nan.safetensors --weights a=.5 x=.5 --out {tmp_path / 'out'}"
    done = run(root, "-m", "scale.cli", *command(files, line))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "NaN or infinite" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


FULL_DISK = f"""
import os, resource, sys
os.environ |= {{"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}}  # as `main` does, before any import
import scale.generate, scale.cli, PIL.PngImagePlugin
scale.generate.SCORERS = {SCORERS}
before = scale.generate.draw
def draw(*args, **options):
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return before(*args, **options)
scale.generate.draw = draw
scale.cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("limit", "some"), [(100, False), (2000, True)])
def test_a_disk_that_fills(root: Path, files: Path, tmp_path: Path, limit: int, some: bool) -> None:
    """When a write fails half way (a real OSError, from a limit on file sizes): code 2, one line, no half of a file.

    100 bytes hold no picture; 2000 hold each picture but not a long record: what came before is kept, and whole.
    """
    line = f"{ASK} --model @model --method base --steps 1 --num 12 --batch-size 1 --out {tmp_path}"
    done = run(root, "-c", FULL_DISK, str(limit), *command(files, line))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert bool(pictures) == some
    assert len(pictures) < 12
    for path in pictures:
        Image.open(path).load()
    if some:
        recorded = {image["file"] for image in json.loads((tmp_path / "generation.json").read_text())["images"]}
        assert recorded
        assert recorded <= {path.name for path in pictures}
    assert len(list(tmp_path.iterdir())) == len(pictures) + some, "a temporary file is left"


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system time of the processes that `work` waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["demo", "--help"]], ids=" ".join)
def test_help_is_quick(root: Path, arguments: list[str]) -> None:
    """`--help` takes less than a second of CPU time and loads neither torch nor diffusers."""
    script = f"""
import sys, scale.cli
try:
    scale.cli.main({arguments})
finally:
    heavy = sorted({{"torch", "numpy", "scipy", "matplotlib", "diffusers", "peft"}} & set(sys.modules))
    print("heavy:", heavy, file=sys.stderr)
"""
    done = []
    spent = cpu_seconds(lambda: done.append(run(root, "-c", script)))
    assert done[0].returncode == 0
    assert "usage: dblend" in done[0].stdout
    assert done[0].stderr == "heavy: []\n"
    assert spent < 1.0
