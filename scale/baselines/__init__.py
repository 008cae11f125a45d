"""What the blends are compared with: CoDe and reward gradient guidance, on the same pipelines, and what images cost."""

from scale.baselines.candidates import code
from scale.baselines.gradient import rgg
from scale.baselines.ledger import Ledger, metered

__all__ = ["Ledger", "code", "metered", "rgg"]
