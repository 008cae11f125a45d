"""The arrows between the rooms, what each may import, and what no file may hold."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOMS = ("dbtheory", "toys", "scale", "proofs_check", "benches", "tests")
ARROWS = {
    "dbtheory": set(),
    "toys": {"dbtheory"},
    "scale": {"dbtheory"},
    "proofs_check": {"toys", "dbtheory"},
}
COMPOSITION_ROOT = "scale/cli.py"
ITS_ARROWS = {"dbtheory", "toys", "proofs_check"}
# dbtheory and toys do without what the `scale` extra installs; figures are the toys' own business
EXTRAS = {"diffusers", "peft", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub"}
FORBIDDEN = {"dbtheory": EXTRAS | {"PIL", "matplotlib", "tyro", "rich"}, "toys": EXTRAS | {"PIL"}}
# inside the core, from the bottom up: a module imports from the layers below its own alone
LAYERS = (
    # what stands on its own
    {"schedule", "reward", "preference", "random", "resampling", "quadrature", "coupling", "definite", "files"},
    {"law", "mixture", "grid", "parametrization", "assignment", "fokker_planck"},
    {"window", "quadratic_cumulants", "metrics"},
    # what a reward does to a law
    {"tilt"},
    {"conditional", "grid_conditional"},
    {"control"},
    {"expansion"},
    {"estimate", "dispersion", "blend_error"},
    {"reward_law"},
    {"bounds"},
    # generation, of which nothing above this line knows
    {"experts"},
    {"blend", "guidance", "steps"},
    {"precision", "interpolate", "correct", "moments", "chapman_kolmogorov"},
    {"kernels", "sampler"},
    {"__init__"},
)
# what generates sees Experts: no law and no reward
SEES_EXPERTS_ONLY = ("assignment", "preference", "blend", "interpolate", "precision", "correct", "steps", "sampler")
LAWS_AND_REWARDS = {"law", "mixture", "grid", "reward", "tilt", "control"}
LONGEST = 350


def modules(root: Path, room: str) -> Iterator[tuple[str, ast.Module]]:
    """Path from the root, and syntax tree, of every Python file of a room."""
    for path in sorted((root / room).rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(path: str, tree: ast.Module) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            stem = ".".join([*package, *([node.module] if node.module else [])])
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_every_kind_of_import() -> None:
    """The control: plain, from, relative, late and by name, or the tests below would pass on anything."""
    source = """
import a.b
from c import d
from . import e
from ..f import g
def late():
    import h
    import_module("i.j"); importlib.import_module("k")
if TYPE_CHECKING:
    from l.m import n
"""
    found = imports("room/sub/file.py", ast.parse(source))
    assert {"a.b", "c.d", "room.sub.e", "room.f.g", "h", "i.j", "k", "l.m.n"} <= found


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_import_along_the_arrows(root: Path, room: str) -> None:
    """toys -> dbtheory; scale -> dbtheory; proofs_check -> toys, dbtheory; the command alone joins them."""
    seen = 0
    for path, tree in modules(root, room):
        allowed = ITS_ARROWS if path == COMPOSITION_ROOT else ARROWS[room]
        others = tops(imports(path, tree)) & set(ROOMS) - {room}
        assert others <= allowed, f"{path} imports {others - allowed}"
        seen += 1
    assert seen or room == "proofs_check"


def test_the_command_joins_rooms_only_inside_its_commands(root: Path) -> None:
    """At its top level `scale/cli.py` imports no other room and nothing heavy, so that `--help` is quick."""
    tree = ast.parse((root / COMPOSITION_ROOT).read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    names = tops(imports(COMPOSITION_ROOT, top))
    assert not names & ({*ROOMS, "torch", "numpy", "scipy", "matplotlib"} | EXTRAS)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_the_core_does_without_the_extras(root: Path, room: str) -> None:
    """dbtheory imports neither diffusers, peft, transformers, PIL nor matplotlib, not even late."""
    for path, tree in modules(root, room):
        foreign = tops(imports(path, tree)) & FORBIDDEN[room]
        assert not foreign, f"{path} imports {foreign}"


def core_imports(root: Path) -> dict[str, set[str]]:
    """Of every module of the core, the modules of the core that it imports."""
    return {
        Path(path).stem: {name.split(".")[1] for name in imports(path, tree) if name.startswith("dbtheory.")}
        for path, tree in modules(root, "dbtheory")
    }


def test_every_module_of_the_core_has_one_layer(root: Path) -> None:
    """A new file has to say where it belongs, and a deleted one is struck off."""
    assert sorted(name for layer in LAYERS for name in layer) == sorted(core_imports(root))


def upward(known: dict[str, set[str]]) -> set[str]:
    """The imports that do not go down."""
    level = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    found = ((name, other) for name, others in known.items() for other in others & level.keys())
    return {f"{name} -> {other}" for name, other in found if level[other] >= level[name]}


def test_imports_inside_the_core_go_down(root: Path) -> None:
    """schedule <- mixture <- tilt <- control <- bounds <- experts <- blend <- sampler, each from lower layers alone."""
    assert not upward(core_imports(root))
    assert upward({"mixture": {"sampler", "schedule"}, "law": {"mixture"}}) == {"mixture -> sampler", "law -> mixture"}


@pytest.mark.parametrize("module", SEES_EXPERTS_ONLY)
def test_what_generates_sees_experts_only(root: Path, module: str) -> None:
    """Blenders, sampler and correction import no law, no reward, no tilt and no control: trained experts have none."""
    assert not core_imports(root)[module] & LAWS_AND_REWARDS


def tracked(root: Path) -> list[Path]:
    """The files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def test_no_file_is_long(root: Path) -> None:
    """One concept a file: none that we write needs more than 350 lines; reports are written by a command."""
    written = root / "docs" / "results"
    sources = [
        path
        for path in tracked(root)
        if path.suffix in (".py", ".toml", ".md", ".yaml", ".cff")
        and (path.name != "report.md" or not path.is_relative_to(written))
    ]
    long = {str(path): n for path in sources if (n := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST}
    assert sources
    assert not long


HOMES = re.compile(
    r"(?<![\w.~])(?:/(?:home|Users|root|work|tmp|workspace|mnt|scratch|data)/\w+|[A-Z]:\\{1,2}\w+)", re.ASCII
)


def test_the_pattern_of_machine_paths() -> None:
    """The control: it finds homes and drives, and leaves addresses, relative and device paths alone."""
    for path in ("home/ada/x", "Users/ada", "root/x", "work/main", "tmp/venv"):
        assert HOMES.search(f'open("/{path}")')
    assert HOMES.search("C:" + "\\Users")
    for text in ("https://x.org/home/ada", "out/tmp/x", "../work/y", "/usr/bin/env", "a/work/b", "~/data/x"):
        assert not HOMES.search(text)


def test_no_file_names_a_path_of_one_machine(root: Path) -> None:
    """A path of the author's machine works nowhere else."""
    for path in tracked(root):
        if path.suffix not in (".safetensors", ".png"):
            found = HOMES.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{path}: {found}"


def closure(names: list[str]) -> set[str]:
    """The distributions that these need, themselves included, as installed here."""
    wanted, found = list(names), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:  # a platform's own package that pip did not choose
            continue
        found.add(requirement.name)
        wanted += needs
    return found


@pytest.fixture(scope="module")
def bare_python(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with the base dependencies and none of the extras."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for name in closure(project["dependencies"]):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return python


def run(python: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_without_the_extras_the_core_imports(root: Path, bare_python: Path) -> None:
    """In an environment without diffusers and its kin, the rooms import, and none of those is loaded."""
    script = f"""
import sys, dbtheory, toys, proofs_check.report, toys.gallery, scale, scale.cli
assert not {EXTRAS} & set(sys.modules), "an extra was loaded"
for extra in {sorted(EXTRAS)}:
    try:
        __import__(extra)
    except ModuleNotFoundError:
        continue
    raise SystemExit("the control failed: " + extra + " is installed here")
"""
    done = run(bare_python, root, "-c", script)
    assert done.returncode == 0, done.stderr + done.stdout


def test_without_the_extras_the_command_says_what_it_needs(root: Path, bare_python: Path) -> None:
    """Generating needs the extra packages: one line that names them, and exit code 2."""
    done = run(bare_python, root, "-m", "scale.cli", "generate", "--prompt", "a red circle", "--weights", "jpeg=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "diffusion-blend[scale]" in done.stderr
