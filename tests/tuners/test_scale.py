"""Call-time factors are taken back without rounding."""

from snell_diffusion.tuners.scale import CallScale


def test_factors_multiply_and_go_in_any_order():
    scale = CallScale()
    for factor in (0.3, 0.7, 1, 0.3):
        scale.push(factor, ["a"])
    assert scale.factors == [0.3, 0.7, 0.3]
    scale.pop(0.7)
    scale.pop(0.9)
    assert scale.factors == [0.3, 0.3]
    scale.pop(0.3)
    assert scale.product() == 0.3
    scale.pop(0.3)
    assert scale.product() == 1.0


def test_popping_none_clears_everything():
    scale = CallScale()
    scale.push(0.5, ["a"])
    scale.push(0.0, ["a"])
    scale.pop(None)
    assert scale.product() == 1.0
    assert not scale.ends_zero_call("a")


def test_a_zero_call_ends_once_per_silenced_adapter():
    scale = CallScale()
    scale.push(0.5, ["a", "b"])
    scale.push(0.0, ["a", "b"])
    assert not scale.ends_zero_call("c")
    assert scale.ends_zero_call("a")
    assert scale.product() == 0.5
    assert scale.ends_zero_call("b")
    assert not scale.ends_zero_call("a")
