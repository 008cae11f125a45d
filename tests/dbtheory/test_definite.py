"""Positive definite or not, against matrices whose eigenvalues are known."""

import torch

from dbtheory.definite import definite_cholesky
from tests.dbtheory.strategies import symmetric, uniform


def test_factors_of_definite_matrices_and_none_of_others() -> None:
    """Eigenvalues in [0.5, 2] give factors whose product is the matrix; one negative eigenvalue in the batch, None."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = uniform(0.5, 2.0, (5, 3), generator)
    for turn in (False, True):
        eigenvalues[2, 1] *= -1 if turn else 1
        matrices = symmetric(5, eigenvalues, generator)
        cholesky = definite_cholesky(matrices, matrices.diagonal(dim1=-2, dim2=-1).abs())
        if turn:
            assert cholesky is None
        else:
            assert cholesky is not None
            torch.testing.assert_close(cholesky @ cholesky.mT, matrices, rtol=1e-12, atol=1e-12)


def test_what_rounding_leaves_is_not_definite() -> None:
    """1e8 + 1 - (1e8 + 1 - 1e-9) is positive in floats, but it is rounding of its terms; 1e-9 by itself is definite."""
    left = torch.tensor([[1e8 + 1.0]], dtype=torch.float64) - (1e8 + 1.0 - 5e-8)
    assert 0 < float(left) < 1e-7
    assert definite_cholesky(left, torch.tensor([2e8], dtype=torch.float64)) is None
    assert definite_cholesky(left, left[0].abs()) is not None
