"""The command `dblend`. Heavy packages load inside the commands that need them, so `--help` is quick."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.conf import Positional, UseAppendAction, subcommand

# a flag with several words that may also be repeated: one tuple for each time it is given
Words = UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Demo:
    """Blend on a toy whose answer is known, then on the shipped image model; figures and tables go to a folder."""

    out: Path = Path("out/demo")
    """Folder of the figures and of demo.json."""
    seed: int = 0
    json: bool = False
    """Print the figures as JSON instead of tables."""

    def run(self) -> None:
        from scale.tables import demo_tables

        results = _demo(self.out, self.seed)
        print(json.dumps(results, indent=1) if self.json else demo_tables(results))


@dataclass(frozen=True)
class Verify:
    """Check every claim of the theory, live: what was measured beside its bound. Exit code 1 if one fails."""

    claim: UseAppendAction[tuple[str, ...]] = ()
    """Only this claim, e.g. proposition-1; may be given several times; a wrong name lists them all."""
    json: Path | None = None
    """Write the rows to this file."""
    html: Path | None = None
    """Write a page to this file."""

    def run(self) -> int:
        return _verify(self.claim, self.json, self.html)


@dataclass(frozen=True)
class Toy:
    """Draw a toy problem whose answer is known: samples, errors, and where each method is best."""

    name: Positional[str]
    """two-modes, ring-of-six, grid-of-nine, ...; a wrong name lists them all."""
    out: Path = Path("out/toy")
    """Folder of the figures; they go into a folder of the toy's name there."""
    seed: int = 0
    json: bool = False
    """Print the figures as JSON instead of tables."""

    def run(self) -> None:
        from scale.tables import toy_table

        results = _toy(self.name, self.out, self.seed)
        print(json.dumps(results, indent=1) if self.json else toy_table(results))


@dataclass(frozen=True)
class Generate:
    """Generate images that follow a preference: PNG files and one JSON record of everything that made them."""

    prompt: str = ""
    """What to draw."""
    prompt_file: Path | None = None
    """A JSON list of prompts, or a text file with one a line."""
    weights: Words = ()
    """NAME=WEIGHT of each adapter (the small world: colorfulness, jpeg), sum 1; "NAME=0.2->0.8" from noise to data."""
    kl_scale: str = "1"
    """lambda: 0 is the base model, 1 the adapters as trained, above 1 further still; "1->1.5" from noise to data."""
    method: str = "mpa"
    """base, mpa, kla (one adapter), mpa-ls (one evaluation a step), mpa-held, msdda, interp, rs, rs-factors (soups)."""
    model: str | None = None
    """A diffusers folder or hub id; the shipped small world if not given."""
    adapter: Words = ()
    """NAME=PATH of each LoRA file or folder."""
    allow_negative: bool = False
    """Let weights be negative: away from an adapter."""
    order: str = "low-discrepancy"
    """How mpa-ls draws: low-discrepancy or iid."""
    exact: float = 0.2
    """mpa-held: the share of steps, the first ones, that evaluate every expert; after them one expert a step."""
    variance: Words = ()
    """msdda: NAME=V of base and each adapter, step variances in units of the sampler's; else the adapters' cards'."""
    midpoint: Words = ()
    """interp: A+B=PATH, an adapter trained on the mean reward of A and B; base+A=PATH, on half of A's."""
    correct: str | None = None
    """resample: the images of a prompt compete, by what the blend knows of its own error."""
    seed: int = 0
    """Seed of each prompt's first image; the next has the next. A seed fixes the noise and the draw of experts."""
    num: int = 1
    """Images a prompt."""
    steps: int = 50
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; the model's own default if not given."""
    eta: float = 1.0
    """Noise of DDIM's step: 1 as in training, 0 is deterministic."""
    scheduler: str | None = None
    """ddim, ddpm, euler, euler-ancestral, dpm++ or flow-euler; the model's own if not given."""
    height: int | None = None
    """Pixels; the model's own size if not given."""
    width: int | None = None
    batch_size: int = 16
    """Images at a time."""
    max_batch: int | None = None
    """Rows at a time through the denoiser, where memory is short; a batch has rows for each adapter and guidance."""
    dtype: str | None = None
    """float32, float16 or bfloat16; float32 on a CPU and for the small world, bfloat16 on a GPU, if not given."""
    offload: bool = False
    """Keep the parts of the model in the CPU's memory while they do not run."""
    out: Path = Path("out/images")
    """Folder of the images and of generation.json. An earlier run's are replaced; other pictures are refused."""

    def run(self) -> None:
        from scale.prompts import parse_adapters, parse_midpoints, parse_variances, parse_weights, read_prompts
        from scale.schedules import parse_amount

        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("give either --prompt TEXT or --prompt-file FILE")
        # base takes the others' flags and ignores them, so that one word turns a command line into its comparison
        blends = self.method != "base"
        words = {name: list(chain(*getattr(self, name))) for name in ("weights", "variance", "midpoint", "adapter")}
        prompts = read_prompts(self.prompt_file) if self.prompt_file else [self.prompt]
        weights = parse_weights(words["weights"]) if blends else {}
        variances = parse_variances(words["variance"]) if blends else {}
        midpoints = parse_midpoints(words["midpoint"]) if blends else {}
        kl_scale, adapters = parse_amount("kl_scale", self.kl_scale), parse_adapters(words["adapter"])
        from scale.generate import generate
        from scale.request import Request

        request = Request(
            prompts, weights, self.out, kl_scale, self.method, self.model, adapters, self.seed, self.num, self.steps,
            self.guidance, self.eta, self.batch_size, order=self.order, exact=self.exact,
            variances=variances or None, midpoints=midpoints or None, correct=self.correct, max_batch=self.max_batch,
            allow_negative=self.allow_negative, dtype=self.dtype, scheduler=self.scheduler, height=self.height,
            width=self.width, offload=self.offload,
        )  # fmt: skip
        print(f"the record of the images is {generate(request)}")


def _demo(out: Path, seed: int) -> dict[str, Any]:
    """Both halves of the demo under one progress bar; writes `demo.json` beside the figures."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output folder {out} is a file; choose another folder")
    from scale.progress import progress_bar

    with progress_bar() as bar:
        # said before anything heavy is imported
        bar.console.print("a toy whose answer is known: ring of six, five preferences, four samplers")
        import toys.demo
        from dbtheory.files import write_atomically

        task = bar.add_task("toy", total=None, note="sampler steps")
        toy = toys.demo.run(out, seed=seed, progress=lambda done, total: bar.update(task, completed=done, total=total))

        from scale.mini import demo as images

        bar.console.print(f"images of the small world: {images.PROMPTS} prompts, the base and five preferences")
        task = bar.add_task("images", total=(len(images.WEIGHTS) + 1) * images.PROMPTS, note="pictures")
        pictures = images.run(out, seed=seed, advance=lambda k: bar.update(task, advance=k))
    results = {"toy": toy, "images": pictures}
    write_atomically(out / "demo.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    return results | {"json": str(out / "demo.json")}


def _verify(claims: Sequence[str], json_file: Path | None, html_file: Path | None) -> int:
    """Checks the claims under a progress bar, prints the tables, writes the files; the exit code."""
    for file in (json_file, html_file):
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file")
    from rich.console import Console

    from scale.progress import progress_bar

    with progress_bar() as bar:
        from dbtheory.files import write_atomically
        from proofs_check import report

        chosen = list(dict.fromkeys(claims)) or report.names()
        task = bar.add_task("claims", total=len(chosen), note="")
        done = report.run_all(chosen, lambda name: bar.update(task, advance=1, note=name))
    console = Console()
    # a file or a pipe has no width: long rows must not wrap at 80
    report.print_table(done, console if console.is_terminal else Console(width=160))
    if json_file is not None:
        text = json.dumps(report.as_json(done), indent=1, allow_nan=False) + "\n"
        write_atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
    if html_file is not None:
        write_atomically(html_file, lambda path: path.write_text(report.as_html(done), encoding="utf-8"))
    return 0 if report.passed(done) else 1


def _toy(name: str, out: Path, seed: int) -> dict[str, Any]:
    """Measures and draws one toy under a progress bar."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output folder {out} is a file; choose another folder")
    import torch

    from scale.progress import progress_bar

    threads = torch.get_num_threads()
    with progress_bar() as bar:
        from toys import gallery

        task = bar.add_task(name, total=None, note="draws")
        try:
            # a few thousand points at a time: threads would mostly wait for each other
            torch.set_num_threads(1)
            return gallery.run(
                name, out, seed=seed, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        finally:
            torch.set_num_threads(threads)


def _commands() -> Any:
    from scale.cli_report import Report
    from scale.cli_sweep import Sweep
    from scale.cli_train import Train

    return (
        Annotated[Demo, subcommand("demo")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Toy, subcommand("toy")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Train, subcommand("train")]
        | Annotated[Sweep, subcommand("sweep")]
        | Annotated[Report, subcommand("report")]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends with exit code 2 and one line on standard error."""
    # the libraries' advice about optional packages is not for users of this command
    for package in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{package}_VERBOSITY", "error")
    command = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.run()
    except ModuleNotFoundError as error:
        _fail(f"{error}; this command needs the extra packages: pip install 'diffusion-blend[scale]'")
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("dblend: interrupted", file=sys.stderr)
        sys.exit(130)
    if code:
        sys.exit(code)


def _parse(arguments: Sequence[str]) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(_commands(), prog="dblend", args=list(arguments), description=__doc__)
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        words = " ".join(complaint.getvalue().translate(str.maketrans("╭╮╰╯─│", "      ")).split())
        _fail(words)


def _fail(message: str) -> NoReturn:
    print("dblend: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
