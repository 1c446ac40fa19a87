"""HTA's update against the product of matrices it stands for."""

from itertools import product

import pytest
import torch

from snell_diffusion.core.householder import (
    REFLECTIONS,
    householder_product,
    householder_update,
)

SIZES = [(6, 6), (5, 9), (9, 4), (1, 3)]


def tensors(I: int, O: int, b: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {"v_l": draw(I), "v_r": draw(O), "d": draw(min(I, O))}
    return given | ({"down": draw(I, b), "up": draw(b, O)} if b else {})


def plain(v_l, v_r, d, down=None, up=None, *, reflection):
    """Both reflections and the diagonal as matrices."""

    def reflect(v):
        c = 1.0 if reflection == "literal" else 2.0 / v.square().sum()
        return torch.eye(len(v), dtype=v.dtype) - c * torch.outer(v, v)

    diagonal = torch.zeros(len(v_l), len(v_r), dtype=v_l.dtype)
    diagonal[range(len(d)), range(len(d))] = d
    delta = reflect(v_l) @ diagonal @ reflect(v_r)
    return delta if down is None else delta + down @ up


@pytest.mark.parametrize(("size", "b", "reflection"), list(product(SIZES, (0, 1, 4), REFLECTIONS)))
def test_update_is_the_product_of_matrices(size, b, reflection):
    given = tensors(*size, b)
    expected = plain(**given, reflection=reflection)
    delta = householder_update(**given, reflection=reflection)
    torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, size[0], dtype=torch.float64)
    y = householder_product(x, **given, reflection=reflection)
    torch.testing.assert_close(y, x @ expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reflection", REFLECTIONS)
def test_gradients(reflection):
    given = {n: t.requires_grad_() for n, t in tensors(4, 6, 2).items()}
    names = list(given)

    def update(*values):
        return householder_update(**dict(zip(names, values, strict=True)), reflection=reflection)

    torch.autograd.gradcheck(update, tuple(given.values()))


def test_unit_reflections_keep_lengths_and_do_not_depend_on_the_vectors_length():
    given = tensors(7, 7, 0)
    given["d"] = torch.ones(7, dtype=torch.float64)
    H = householder_update(**given)
    torch.testing.assert_close(H @ H.T, torch.eye(7, dtype=torch.float64))
    given["v_l"] = 5 * given["v_l"]
    torch.testing.assert_close(householder_update(**given), H)


def test_a_vector_of_zeros_reflects_nothing():
    given = tensors(4, 4, 0)
    given["v_l"] = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    given["v_r"] = torch.zeros(4, dtype=torch.float64)
    delta = householder_update(**given)
    torch.testing.assert_close(delta, torch.diag(given["d"]))
    delta.sum().backward()
    assert torch.isfinite(given["v_l"].grad).all()


def test_zero_start_has_live_gradients():
    given = {n: t.requires_grad_() for n, t in tensors(5, 6, 1).items()}
    with torch.no_grad():
        given["d"].zero_()
        given["up"].zero_()
    delta = householder_update(**given)
    assert not delta.any()
    delta.square().sum().backward()
    (householder_update(**given) * torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    assert given["d"].grad.abs().min() > 0
    assert given["up"].grad.abs().min() > 0


def test_errors():
    given = tensors(4, 6, 1)
    with pytest.raises(ValueError, match="reflection 'half' is unknown; known: literal, unit"):
        householder_update(**given, reflection="half")
    with pytest.raises(
        ValueError, match=r"d \[min\(I, O\)\] are needed, got \[4\], \[6\] and \[6\]"
    ):
        householder_update(given["v_l"], given["v_r"], given["v_r"])
    with pytest.raises(ValueError, match="down and up come together"):
        householder_update(given["v_l"], given["v_r"], given["d"], given["down"])
    with pytest.raises(ValueError, match=r"with I = 4 and O = 6, got \[4, 1\] and \[1, 4\]"):
        householder_update(**{**given, "up": given["down"].T})
