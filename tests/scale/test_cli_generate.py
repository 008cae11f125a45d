"""The flags of `dblend generate`: each reaches the record, and a wrong one is refused before the model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import scale.generate
from scale.cli import main
from tests.scale import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and four adapters."""
    folder = tmp_path_factory.mktemp("files")
    tiny.sd().save_pretrained(folder / "model")
    for seed, name in enumerate("abcd"):
        tiny.save_lora(tiny.sd, folder / name, seed)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale.generate, "SCORERS", {})


def words_of(files: Path, line: str) -> list[str]:
    """A command line; `@x` stands for the file x, and ` ~ ` joins words that a shell's quotes would."""
    words = f"generate --prompt red --model @model --steps 2 --adapter a=@a b=@b {line}".split()
    return [word.replace("@", f"{files}/").replace("~", " ") for word in words]


def run(files: Path, line: str) -> dict[str, Any]:
    main(words_of(files, line))
    return json.loads(Path("out/images/generation.json").read_text())


FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "functions of progress": (
        "--weights a=0.2->0.8 b=0.8->0.2 --kl-scale 1->1.5",
        {"weights": {"a": "0.2->0.8", "b": "0.8->0.2"}, "kl_scale": "1.0->1.5"},
    ),
    "a lambda of one number": ("--weights a=1 --kl-scale 1.5", {"kl_scale": 1.5, "weights": {"a": 1.0}}),
    "three legs": ("--weights a=.2->.8->.5 b=.8->.2->.5", {"weights": {"a": "0.2->0.8->0.5", "b": "0.8->0.2->0.5"}}),
    "spaces in quotes": ("--weights a=0~->~1 b=1~->~0", {"weights": {"a": "0.0->1.0", "b": "1.0->0.0"}}),
    "order": ("--method mpa-ls --weights a=.5 b=.5 --order iid", {"options": {"order": "iid"}}),
    "order by default": ("--method mpa-ls --weights a=.5 b=.5", {"options": {"order": "low-discrepancy"}}),
    "exact steps": ("--method mpa-held --weights a=.5 b=.5 --exact .5", {"options": {"exact": 0.5}}),
    "variances": (
        "--method msdda --weights a=.5 b=.5 --variance base=1 a=.5 --variance b=2",
        {"options": {"variances": {"base": 1.0, "a": 0.5, "b": 2.0}}},
    ),
    "midpoints": (
        "--method interp --weights a=.5 b=.5 --midpoint a+b=@c base+a=@d",
        {"options": {"midpoints": {"a+b": "@c", "base+a": "@d"}}},
    ),
    "soup": ("--method rs --weights a=.5 b=.5", {"method": "rs"}),
    "soup of factors": ("--method rs-factors --weights a=.5 b=.5", {"method": "rs-factors"}),
    "resampling": ("--weights a=.5 b=.5 --correct resample --num 2", {"options": {"correct": "resample"}}),
    "negative": ("--weights a=1.5 b=-0.5 --allow-negative", {"options": {"allow_negative": True}}),
    "machine": ("--weights a=1 --max-batch 1 --dtype bfloat16", {"max_batch": 1, "dtype": "bfloat16"}),
    "scheduler": ("--weights a=1 --scheduler dpm++", {"scheduler": "DPMSolverMultistepScheduler", "eta": None}),
    "size": ("--weights a=1 --height 24 --width 32", {"height": 24, "width": 32}),
    "base ignores the rest": (
        "--method base --weights a=nonsense --midpoint x --variance y --order z --correct resample",
        {"method": "base", "weights": {}, "adapters": {}},
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_reach_the_record(files: Path, case: str) -> None:
    """Each flag does what it says: the record has it, and a picture lies beside."""
    line, listed = FLAGS[case]
    record = run(files, line)
    expected = json.loads(json.dumps(listed).replace("@", f"{files}/"))
    options = expected.pop("options", {})
    assert {name: record["options"][name] for name in options} == options
    assert {name: record[name] for name in expected} == expected
    assert all((Path("out/images") / image["file"]).is_file() for image in record["images"])


HALVES = "--weights a=.5 b=.5"
REFUSED = {
    "half a function": ("--weights a=0.2-> b=.8", "the weight of 'a' must be a number, or several"),
    "a function without values": ("--weights a=->", "the weight of 'a' must be a number"),
    "cut by the shell": ("--weights a=0.2- b=0.8-", "in quotes"),
    "too large": ("--weights a=1e400", "the weight of 'a' must be finite"),
    "from NaN": ("--weights a=nan->1", "the weight of 'a' must be finite"),
    "a unicode arrow": ("--weights a=0→1 b=1→0", "the weight of 'a' must be a number"),
    "digits of another script": ("--weights a=٠->١", "the weight of 'a' must be a number"),
    "functions that do not sum to 1": ("--weights a=0->1 b=0->1", "must sum to 1"),
    "a sum that fails between": ("--weights a=.5->.9->.5->.9->.5 b=.5", "must sum to 1"),
    "a function below 0": ("--weights a=1->-1 b=0->2", "negative"),
    "no lambda": (f"{HALVES} --kl-scale ->", "kl_scale must be a number"),
    "lambda to infinity": (f"{HALVES} --kl-scale 1->inf", "kl_scale must be finite"),
    "lambda below 0": (f"{HALVES} --kl-scale 1->-1->1", "kl_scale must be at least 0"),
    "lambda of text": (f"{HALVES} --kl-scale one", "kl_scale must be a number"),
    "lambda below 0, base": ("--method base --kl-scale 1->-1", "kl_scale must be at least 0"),
    "LS above 1": (f"{HALVES} --method mpa-ls --kl-scale 1->2", "use mpa"),
    "order": (f"{HALVES} --method mpa-ls --order sobol", "order must be"),
    "order of another method": (f"{HALVES} --order iid", "order belongs to the method mpa-ls"),
    "no exact step": (f"{HALVES} --method mpa-held --exact 0", "exact is the share of steps"),
    "held above 1": (f"{HALVES} --method mpa-held --kl-scale 1->2", "use mpa"),
    "exact of another method": (f"{HALVES} --exact .5", "exact belongs to the method mpa-held"),
    "variance missing": (f"{HALVES} --method msdda --variance a=1", "variance"),
    "variance of nobody": (f"{HALVES} --method msdda --variance base=1 a=1 b=1 c=1", "'base', 'c']"),
    "variance 0": (f"{HALVES} --method msdda --variance base=1 a=0 b=1", "one positive finite number"),
    "variance changing": (f"{HALVES} --method msdda --variance base=1 a=1->2 b=1", "one positive finite number"),
    "variance of another method": (f"{HALVES} --variance base=1", "variances belongs to the method msdda"),
    "no midpoint": (f"{HALVES} --method interp", "give --midpoint A+B=PATH"),
    "midpoint of one": (f"{HALVES} --method interp --midpoint a=@c", "two different names"),
    "midpoint of nobody": (f"{HALVES} --method interp --midpoint a+z=@c", "an edge joins two of"),
    "midpoint twice": (f"{HALVES} --method interp --midpoint a+b=@c b+a=@c", "given twice"),
    "midpoint of another method": (f"{HALVES} --midpoint a+b=@c", "midpoints belongs to the method interp"),
    "midpoint missing": (f"{HALVES} --method interp --midpoint a+b=@none", "no adapter at"),
    "adapter missing": ("--weights c=1 --adapter c=@none", "no adapter at"),
    "correct": (f"{HALVES} --correct weigh", "unknown correct 'weigh'"),
    "correct LS": (f"{HALVES} --method mpa-ls --correct resample", "resampling needs every expert"),
    "correct in two batches": (f"{HALVES} --correct resample --num 3 --batch-size 2", "must be in one batch"),
    "max batch 0": (f"{HALVES} --max-batch 0", "max_batch must be at least 1"),
    "dtype": (f"{HALVES} --dtype int8", "unknown dtype 'int8'"),
    "scheduler": (f"{HALVES} --scheduler heun", "unknown scheduler 'heun'"),
    "height": (f"{HALVES} --height 20", "height must be a positive multiple of 8"),
    "width": (f"{HALVES} --width -8", "width must be a positive multiple of 8"),
    "offload": (f"{HALVES} --offload", "there is no GPU"),
}


def refusal(files: Path, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command line says: exit code 2 and one line on standard error alone."""
    with pytest.raises(SystemExit) as ended:
        main(words_of(files, line))
    output = capsys.readouterr()
    assert (ended.value.code, output.out, len(output.err.splitlines())) == (2, "", 1)
    return output.err


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_flags_are_refused_before_the_model_is_loaded(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Exit code 2 and one line that says what is wrong; no model, no file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scale.generate, "open_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))
    line, reason = REFUSED[case]
    assert reason in refusal(files, line, capsys)
    assert not Path("out").exists()


AFTER = {
    "flow matching for a model that is not": (f"{HALVES} --scheduler flow-euler", "cannot sample this model"),
    "msdda without noise": (f"{HALVES} --method msdda --variance base=1 a=1 b=2 --eta 0", "no noise of its own"),
    "resampling without noise": (f"{HALVES} --correct resample --scheduler dpm++", "no noise of its own"),
    "midpoint with a dot": ("--weights a.x=.5 b=.5 --adapter a.x=@a --method interp --midpoint a.x+b=@c", "dots"),
}


@pytest.mark.parametrize("case", AFTER)
def test_what_only_the_model_tells_is_refused_too(files: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """The same one line where it takes the model, its scheduler or an adapter's file to know; no picture is written."""
    line, reason = AFTER[case]
    assert reason in refusal(files, line, capsys)
    assert not list(Path().rglob("*.png"))


def test_msdda_takes_the_variances_of_cards(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a card states is used and recorded; where no card states any, the log says that msdda is DB-MPA."""
    carded = tiny.save_lora(tiny.sd, tmp_path / "carded", 4)
    (carded / "README.md").write_text("---\nstep_variance: 0.5\n---\n")
    record = run(files, f"--method msdda --weights a=.5 c=.5 --adapter c={carded}")
    assert record["options"]["variances"] == {"base": 1.0, "a": 1.0, "c": 0.5}
    assert not caplog.messages
    assert run(files, "--method msdda --weights a=.5 b=.5")["options"]["variances"] is None
    assert "msdda is DB-MPA here" in "".join(caplog.messages)


def test_a_used_folder(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run replaces the first; a picture that is not the first's is refused by name, and stays."""
    run(files, "--weights a=1 --num 3")
    assert len(run(files, "--weights b=1 --seed 1")["images"]) == 1
    assert [path.name for path in Path("out/images").glob("*.png")] == ["00000-1.png"]
    Path("out/images/00000-0.png").write_text("mine")
    capsys.readouterr()
    assert "00000-0.png" in refusal(files, "--weights a=1", capsys)
    assert Path("out/images/00000-0.png").read_text() == "mine"
