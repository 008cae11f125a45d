"""What ships: every scorer keeps the protocol, and the registry finds it."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from scale.rewards import MODELS, SCORERS, Scorer, load_scorer
from scale.rewards.alignment import Alignment
from scale.rewards.colorfulness import Colorfulness
from scale.rewards.jpeg import Jpeg
from scale.rewards.symmetry import Symmetry
from tests.scale.rewards.pictures import PROMPTS, blocks, random_judge

SHIPPED = {"alignment": Alignment, "colorfulness": Colorfulness, "jpeg": Jpeg, "symmetry": Symmetry}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a judge of random weights: the tests need no shipped ones."""
    folder = tmp_path_factory.mktemp("judge")
    random_judge(folder)
    return folder


@pytest.fixture(params=SHIPPED)
def scorer(request: pytest.FixtureRequest, judge: Path) -> Scorer:
    return load_scorer(request.param, judge if request.param == "alignment" else None)


def test_the_registry_finds_what_ships(judge: Path) -> None:
    """Each name loads the class of that name, and no name is missing here."""
    assert SHIPPED.keys() == SCORERS.keys()
    for name, kind in SHIPPED.items():
        loaded = load_scorer(name, str(judge) if name == "alignment" else None)
        assert type(loaded) is kind
        assert loaded.name == name


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_finds_what_needs_weights(name: str) -> None:
    """Each name stands for a class in whose source it is the name; no name means two rewards."""
    module, attribute = MODELS[name].split(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == attribute)
    assert f"name = {name!r}" in [ast.unparse(statement) for statement in kind.body]
    assert name not in SCORERS


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_needs_weights_is_a_scorer(name: str) -> None:
    """Imported, which takes seconds, each is a subclass of `Scorer`."""
    module, attribute = MODELS[name].split(":")
    kind = getattr(import_module(module), attribute)
    assert issubclass(kind, Scorer)
    assert kind.name == name


def test_scores_are_one_float32_an_image_in_range(scorer: Scorer) -> None:
    """One finite float32 an image, inside the range that the scorer states; none for no images."""
    scores = scorer.score(blocks(), PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    low, high = scorer.range
    assert bool(((scores >= low) & (scores <= high)).all())
    assert scorer.score(blocks()[:0], []).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_scored_in_float32(scorer: Scorer, dtype: torch.dtype) -> None:
    """Images of any precision get the float32 scores of the float32 images that they round to."""
    pixels = blocks().to(dtype)
    assert torch.equal(scorer.score(pixels, PROMPTS), scorer.score(pixels.float(), PROMPTS))


def test_scores_do_not_depend_on_batch_or_order(scorer: Scorer) -> None:
    """An image's score is its own: alone, or among others in another order."""
    batch = blocks()
    together = scorer.score(batch, PROMPTS)
    backwards = scorer.score(batch.flip(0), PROMPTS[::-1]).flip(0)
    alone = torch.cat([scorer.score(batch[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(backwards, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_pixels_where_the_scorer_says_so(scorer: Scorer) -> None:
    """`differentiable` is true exactly where a gradient comes back to every image."""
    pixels = blocks().requires_grad_()
    scores = scorer.score(pixels, PROMPTS)
    assert scores.requires_grad == scorer.differentiable
    if scorer.differentiable:
        scores.sum().backward()
        assert pixels.grad is not None
        assert bool(pixels.grad.isfinite().all())
        assert bool((pixels.grad.flatten(1).abs().amax(1) > 0).all())


def test_scorers_check_their_images(scorer: Scorer) -> None:
    """Every scorer refuses NaN: a NaN score would be recorded as if it were one."""
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        scorer.score(torch.full((1, 3, 64, 64), torch.nan), PROMPTS[:1])


def test_alignment_alone_has_prompts_that_it_does_not_know(scorer: Scorer) -> None:
    """Every scorer knows captions of the small world; other prompts all but `alignment` do."""
    assert all(scorer.knows(prompt) for prompt in PROMPTS)
    assert scorer.knows("an astronaut on a horse") == (scorer.name != "alignment")


def test_an_unknown_reward_is_refused() -> None:
    """`load_scorer` names the rewards that there are, of both kinds."""
    with pytest.raises(ValueError, match=r"no reward 'beauty'.* alignment, colorfulness, jpeg, symmetry;.* clipscore"):
        load_scorer("beauty")


@pytest.mark.parametrize("name", ["colorfulness", "jpeg", "symmetry"])
def test_a_model_for_a_reward_without_one_is_refused(name: str, tmp_path: Path) -> None:
    """A folder that nothing would read is a slip: ValueError that lists the rewards that take one."""
    with pytest.raises(ValueError, match=f"{name} takes no model.*those that do are alignment, clipscore"):
        load_scorer(name, tmp_path)


def test_the_model_of_alignment_is_its_judge(tmp_path: Path) -> None:
    """The folder is what is read: without a judge in it the scorer is refused."""
    with pytest.raises(ValueError, match="no judge"):
        load_scorer("alignment", tmp_path)
