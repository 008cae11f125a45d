"""The settings of reward-weighted denoising."""

from dataclasses import dataclass

from scale.train.denoiser import ATTENTION, CONVOLUTIONS
from scale.train.settings import check_numbers


@dataclass(frozen=True)
class Tilted:
    """Settings of a run; the defaults are the small world's."""

    alpha: float = 0.3
    """Strength of the KL to the base model, in units of the reward: images are weighted by e^{reward / alpha}."""
    prompts: int = 256
    """Prompts whose samples are drawn; all of them where the list is shorter."""
    samples_per_prompt: int = 16
    """Images a prompt, among which the weights are shared out: no weight exceeds it."""
    rollout_batch: int = 64
    """Images at a time while sampling, on each process; they are stored, and resumed, in parts of this size."""
    steps: int = 50
    """DDIM steps (eta = 1) of a sample, and the times at which the adapter is trained."""
    guidance: float = 1.0
    """1 is none: only then is what the denoiser predicts the score of what it samples."""
    size: int | None = None
    """Height and width of the images in pixels; the model's own if not given."""

    look_ahead: bool = True
    """Score the base's guess of the image at every noised sample, for the control variate; False is the plain loss."""
    rounds: int = 20
    """Rounds of updates, a record each."""
    updates: int = 100
    """Updates a round."""
    batch: int = 128
    """Noised samples an update, over all processes."""
    microbatch: int = 64
    """Noised samples at a time on each process; gradients accumulate over them."""
    learning_rate: float = 1e-3
    decay: bool = True
    """Lower the learning rate linearly to zero over the run, which averages the noise of the last updates out."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    rank: int = 4
    targets: tuple[str, ...] = ATTENTION + CONVOLUTIONS
    """Layers that the adapter is on, by the ends of their names."""
    precision: str = "bf16"
    """Of the denoiser's arithmetic: no (float32), bf16 or fp16. The adapter is always kept in float32."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""

    checkpoint_every: int = 1
    """Rounds between checkpoints; a killed run resumes from the last."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")
        for name in ("guidance", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, received {getattr(self, name)}")
        check_numbers(self.learning_rate, self.size)
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: a single sample of a prompt has always weight 1")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be no, bf16 or fp16, received {self.precision!r}")


_POSITIVE = (
    "alpha", "prompts", "rollout_batch", "steps", "rounds", "updates", "batch", "microbatch", "learning_rate",
    "max_grad_norm", "rank", "checkpoint_every",
)  # fmt: skip
