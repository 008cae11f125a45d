"""`dblend train`: configs, settings and flags that reach the run, and one line with exit code 2 on anything wrong."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scale.cli import main
from scale.prompts import read_prompts
from scale.rewards import MODELS, SCORERS
from scale.rewards.expression import terms_of
from scale.train.experiment import CONFIGS, Experiment, config_names, parse_setting, read_config
from scale.train.settings import MINI, PRESETS
from scale.train.tilted_settings import Tilted
from tests.scale import tiny
from tests.scale.test_cli import assert_refused, cpu_seconds

SMALL = (
    "--rounds 1 --set prompts_per_round=1 samples_per_prompt=2 steps=2 batch=4 updates=1 value_updates=0 precision=no"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and configs and folders good and bad."""
    folder = tmp_path_factory.mktemp("files")
    tiny.sd().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "others.txt").write_text("a red circle\na lighthouse\n")
    (folder / "empty").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "pytorch_lora_weights.safetensors").touch()
    configs = {
        "mine": "reward: colorfulness\nlambda: 2\nsettings: {alpha: 1e-3, targets: [to_q], size: null, decay: false}",
        "key": "reward: colorfulness\nlr: 1",
        "list": "- reward",
        "table": "reward: colorfulness\nsettings: [1]",
        "broken": "reward: [",
        "bomb": "a: &a [1]\nb: *a",
        "object": "reward: !!python/object/apply:os.system [ls]",
        "nested": "reward: " + "[" * 5000,
        "long": "# " + "x" * 30_000,
        "half": "reward: colorfulness\nlambda: 0",
        "typed": "reward: colorfulness\nsettings: {rounds: [1, 2]}",
        "words": "reward: colorfulness\nprompts: [a cat, yes]",
        "asks": "reward: colorfulness\nmodel: owner/name\nneeds: the captions of my cats",
    }
    for name, text in configs.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def words(files: Path, line: str) -> list[str]:
    """A command line; `@x` stands for the file x."""
    return [word.replace("@", f"{files}{os.sep}") for word in shlex.split(f"train {line}")]


@pytest.mark.parametrize("name", config_names())
def test_every_config_is_a_valid_experiment(name: str) -> None:
    """It gives the paper's settings, a reward whose names exist and a public model, and says what prompts it needs."""
    experiment = read_config(name)
    settings = experiment.make_settings()
    assert settings.alpha == pytest.approx(PRESETS["paper"].alpha / experiment.kl_scale)
    assert (settings.clip, settings.rank, settings.learning_rate) == (1e-4, 4, 1e-5)
    rewards = [term for _, term in terms_of(experiment.reward)]
    assert rewards
    assert {*rewards} <= {*SCORERS, *MODELS}
    assert experiment.model in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-xl-base-1.0",
    )
    assert bool(experiment.prompts) != bool(experiment.needs)
    assert not {*yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())} & {"kl_scale", "algorithm"}


def test_the_configs_cover_the_paper() -> None:
    """Four experts, MORL at three preferences, the KL scales of figure 14, and SDXL's two experts; weights sum to 1."""
    made = {name: read_config(name) for name in config_names()}
    rewards = {name: [term for _, term in terms_of(e.reward)] for name, e in made.items()}
    single = {rewards[name][0] for name in made if name.startswith("sd15-") and len(rewards[name]) == 1}
    assert single == {"imagereward", "vila", "pickscore", "jpeg"}
    morl = {name: [weight for weight, _ in terms_of(made[name].reward)] for name in made if "morl" in name}
    assert {weights[0] for weights in morl.values()} == {0.2, 0.5, 0.8}
    assert all(sum(weights) == pytest.approx(1) for weights in morl.values())
    assert {e.kl_scale for e in made.values()} == {0.2, 0.5, 0.7, 1.0, 1.5, 2.0}
    assert {made[name].prompts for name in made if name.startswith("sdxl")} == {("an orange colored sandwich",)}
    for name, experiment in made.items():
        digits = re.search(r"\d\.\d$", name)
        stated = morl[name][0] if name in morl else experiment.kl_scale
        assert digits is None or float(digits[0]) == stated


def test_a_config_of_ones_own(files: Path) -> None:
    """Values over the preset's, in the settings' own types; lambda divides alpha, whoever set it."""
    experiment = read_config(str(files / "mine.yaml"))
    settings = experiment.make_settings()
    assert (settings.alpha, settings.targets, settings.size, settings.decay) == (5e-4, ("to_q",), None, False)
    assert (settings.clip, experiment.preset) == (MINI.clip, "mini")


@pytest.mark.parametrize(
    ("value", "kind", "made"),
    [
        ("3", int, 3), (3, float, 3.0), ("1e-4", float, 1e-4), (True, bool, True), ("False", bool, False),
        ("none", int | None, None), (None, int | None, None), ("64", int | None, 64), ("bf16", str, "bf16"),
        ("to_q, to_k", tuple[str, ...], ("to_q", "to_k")), (["to_q"], tuple[str, ...], ("to_q",)),
    ],
)  # fmt: skip
def test_values_are_read_by_the_setting_s_type(value: object, kind: Any, made: object) -> None:
    """Text and YAML's own values come out alike, of the type that the setting has."""
    read = parse_setting("x", value, kind)
    assert read == made
    assert type(read) is type(made)


def test_tilted_has_settings_of_its_own() -> None:
    """The algorithm decides which names are settings."""
    assert Experiment(algorithm="tilted", settings={"prompts": "7"}).make_settings() == Tilted(prompts=7)
    with pytest.raises(ValueError, match="no setting clip of tilted; they are alpha, prompts"):
        Experiment(algorithm="tilted", settings={"clip": "1"}).make_settings()


ON = "--model @model --prompt-file @prompts.txt"
REFUSED = {
    "no reward": (ON, "give --reward EXPRESSION"),
    "unknown reward": (f"--reward beauty {ON}", "no reward 'beauty'"),
    "no sum": (f"--reward '2*' {ON}", "cannot read"),
    "reward model of nobody": (f"--reward jpeg {ON} --reward-model pickscore=x", "does not use"),
    "reward model without =": (f"--reward jpeg {ON} --reward-model pickscore", "not NAME=VALUE"),
    "reward without weights": (f"--reward pickscore {ON} --reward-model pickscore=@empty", "@empty"),
    "unknown algorithm": (f"--reward jpeg {ON} --algorithm ppo", "no algorithm 'ppo'; it is one of dpok, tilted"),
    "unknown preset": (f"--reward jpeg {ON} --preset huge", "no preset 'huge' of dpok; it is one of mini, paper"),
    "preset of the other": (f"--reward jpeg {ON} --algorithm tilted --preset paper", "no preset 'paper' of tilted"),
    "unknown setting": (f"--reward jpeg {ON} --set lr=1", "no setting lr of dpok; they are alpha, later_kl, rounds"),
    "setting without =": (f"--reward jpeg {ON} --set lr", "'lr' is not NAME=VALUE"),
    "no whole number": (f"--reward jpeg {ON} --set rounds=1.5", "rounds must be a whole number, received '1.5'"),
    "no number": (f"--reward jpeg {ON} --set clip=small", "clip must be a finite number"),
    "infinite": (f"--reward jpeg {ON} --set clip=inf", "clip must be a finite number"),
    "no truth": (f"--reward jpeg {ON} --set decay=maybe", "decay must be true or false"),
    "negative": (f"--reward jpeg {ON} --alpha -1", "alpha must be positive"),
    "NaN": (f"--reward jpeg {ON} --alpha nan", "alpha must be a finite number"),
    "no precision": (f"--reward jpeg {ON} --set precision=int8", "precision must be no, bf16 or fp16"),
    "no rounds": (f"--reward jpeg {ON} --rounds 0", "rounds must be positive"),
    "alpha twice": (f"--reward jpeg {ON} --alpha 1 --set alpha=2", "alpha is given twice"),
    "setting twice": (f"--reward jpeg {ON} --set clip=1 --set clip=2", "'clip' is given twice"),
    "unknown config": (f"--config none {ON}", "no config 'none'; give a YAML file, or one of sd15-geneval-imagereward"),
    "config a folder": (f"--config @empty {ON}", "no config"),
    "config outside": (f"--config ../settings {ON}", "no config '../settings'"),
    "config's key": (f"--config @key.yaml {ON}", "unknown 'lr'; the keys are algorithm, lambda, model, needs"),
    "config a list": (f"--config @list.yaml {ON}", "must be a table"),
    "config's settings a list": (f"--config @table.yaml {ON}", "settings must be a table"),
    "config broken": (f"--config @broken.yaml {ON}", "cannot be read"),
    "config of aliases": (f"--config @bomb.yaml {ON}", "aliases, which are not read"),
    "config of objects": (f"--config @object.yaml {ON}", "cannot be read"),
    "config nested": (f"--config @nested.yaml {ON}", "more than 20 levels"),
    "config long": (f"--config @long.yaml {ON}", "more than 20000 bytes"),
    "config's lambda": (f"--config @half.yaml {ON}", "lambda must be positive and finite"),
    "config's prompt": ("--config @words.yaml", "the prompt True, which YAML reads as no text; put it in quotes"),
    "config's type": (f"--config @typed.yaml {ON}", "rounds must be a whole number"),
    "no prompts": ("--reward jpeg --model @model", "no prompts to train on; give --prompt-file FILE"),
    "the config's prompts": ("--config @asks.yaml", "give --prompt-file FILE: the captions of my cats"),
    "prompts missing": ("--reward jpeg --prompt-file @none.txt", "cannot read the prompt file"),
    "prompts of no caption": (
        "--reward 0.5*alignment+jpeg --prompt-file @others.txt",
        "cannot score images of 1 of the 2 prompts, the first is 'a lighthouse'",
    ),
    "no model": ("--reward jpeg --prompt-file @prompts.txt --model @none", "no model at"),
    "out a file": (f"--reward jpeg {ON} --out @prompts.txt", "is a file"),
    "work a file": (f"--reward jpeg {ON} --work @prompts.txt", "is a file"),
    "out of another": (f"--reward jpeg {ON} --out @taken", "holds an adapter with no readable training.json"),
    "too many steps": (f"--reward jpeg {ON} --set steps=5000", "steps must lie between 1 and"),
    "samples of dpok": (f"--reward jpeg {ON} --samples @empty", "samples belong to the algorithm tilted"),
    "no layer": (f"--reward jpeg {ON} --set targets=nothing", "nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_code_2(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Whatever is wrong: exit code 2, one line that names it, and no adapter."""
    monkeypatch.chdir(tmp_path)
    line, reason = REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        main(words(files, line))
    assert_refused(capsys, ended.value.code, reason.replace("@", f"{files}{os.sep}"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_prints_its_figures(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints training.json's figures and the last round; flags reach the settings; then it can be used."""
    line = f"--reward '0.5*jpeg + colorfulness' {ON} {SMALL} --alpha 0.5 --seed 3 --set size=16"
    main(words(files, f"{line} --json --out {tmp_path / 'out'} --work {tmp_path / 'w'}"))
    output = capsys.readouterr()
    printed, card = json.loads(output.out), json.loads((tmp_path / "out" / "training.json").read_text())
    assert output.err == ""
    assert printed["last_round"] == card["history"][-1]
    assert printed | {"history": card["history"]} == card | {k: printed[k] for k in ("last_round", "out", "work")}
    settings = card["settings"]
    assert (settings["alpha"], settings["seed"], settings["size"], settings["rounds"]) == (0.5, 3, 16, 1)
    assert (card["model"], card["reward"], card["prompts"]) == ("model", "0.5*jpeg + colorfulness", 2)
    assert len(read_prompts(files / "prompts.txt")) == 2
    assert (tmp_path / "w" / "checkpoint.pt").is_file()
    adapter = f"--adapter x={tmp_path / 'out'} --weights x=1 --method kla --kl-scale .5 --steps 1"
    generate = f"generate --prompt red --model {files / 'model'} {adapter} --out {tmp_path / 'images'}"
    main(generate.split())
    assert (tmp_path / "images" / "generation.json").is_file()


def test_divergence_ends_with_code_1(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says why and where the weights are; no adapter."""
    hasty = SMALL.replace(" updates=1", " updates=4 learning_rate=100 max_ratio=1e-4")
    line = words(files, f"--reward colorfulness {ON} {hasty} --out {tmp_path / 'o'}")
    with pytest.raises(SystemExit) as ended:
        main(line)
    output = capsys.readouterr()
    assert ended.value.code == 1
    assert output.out == ""
    assert re.fullmatch(r"dblend: the probability ratio left .* stopped in round 1, .*\n", output.err)
    assert not (tmp_path / "o" / "pytorch_lora_weights.safetensors").exists()


def test_help_is_quick(root: Path) -> None:
    """`dblend train --help` takes less than a second of CPU time and loads neither torch nor diffusers."""
    script = """
import sys, scale.cli
try:
    scale.cli.main(["train", "--help"])
finally:
    heavy = {"torch", "numpy", "scipy", "diffusers", "peft", "tensorboard", "yaml", "accelerate"}
    print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done: list[subprocess.CompletedProcess] = []
    command = [sys.executable, "-c", script]
    spent = cpu_seconds(
        lambda: done.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=False))
    )
    assert done[0].returncode == 0
    assert "--reward-model" in done[0].stdout
    assert done[0].stderr == "heavy: []\n"
    assert spent < 1.0


@pytest.mark.slow
def test_two_processes(root: Path, files: Path, tmp_path: Path) -> None:
    """`accelerate launch -m scale.cli train` with two processes: one output, one adapter, one process's history.

    The control is a batch of three transitions, which two processes cannot share: so there are two.
    """
    common = words(files, f"--reward colorfulness {ON} {SMALL} --json")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # accelerate's own --cpu starts a single process; with --multi_gpu it starts two, which without a GPU use gloo
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    launch += "--dynamo_backend no --main_process_port 0 -m scale.cli"

    def launched(out: str, batch: int) -> subprocess.CompletedProcess[str]:
        options = [f"batch={batch}" if word == "batch=4" else word for word in common]
        command = [sys.executable, *launch.split(), *options, "--out", str(tmp_path / out)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)

    assert "2 processes cannot share" in launched("odd", 3).stderr
    done = launched("two", 4)
    assert done.returncode == 0, done.stderr
    main([*common, "--out", str(tmp_path / "one")])
    printed = json.loads(done.stdout)
    two, one = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("two", "one"))
    assert printed["last_round"] == two["history"][-1]
    # shapes of batches differ, so roundings do; test_processes.py measures weights against a control
    assert two["history"][0] == pytest.approx(one["history"][0], rel=5e-3, abs=1e-6)
    assert two["settings"] == one["settings"]


def test_the_guide_s_first_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shell lines work, here with fewer rounds and steps, and draw with the adapter that they trained."""
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "training.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "dblend"
        main([command, *arguments, *{"train": SMALL, "generate": "--steps 1"}[command].split()])
    record = json.loads((tmp_path / "out" / "images" / "generation.json").read_text())
    assert record["weights"] == {"mine": 1.0}


def test_the_guide_names_what_there_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In docs/training.md every flag is the command's, every config ships, every figure is a record's or a setting."""
    from scale.train.settings import Dpok

    text = (root / "docs" / "training.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    lines = re.findall(r"(?:dblend|scale\.cli) train (.*)", text.replace("\\\n", " "))
    named = {flag for line in lines for flag in re.findall(r"--[a-z][a-z-]+", line)}
    assert named
    assert named <= known
    configs = set(re.findall(r"--config ([a-z0-9.-]+)", text))
    assert configs
    assert configs - {"mine.yaml"} <= {*config_names()}
    figures = set(re.findall(r"^\| `([a-z_]+)`", text, re.MULTILINE))
    records = {"reward", "spread", "kl", "ratio", "gradient", "value_loss", "learning_rate"}
    assert records <= figures
    for name in set(re.findall(r"--set ([a-z_]+)=", text)):
        assert name in {*Dpok.__dataclass_fields__, *Tilted.__dataclass_fields__}
