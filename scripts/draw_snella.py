"""Draw docs/images/how_snella_works.png: one small layer's update, from its factors to its zeros.

Numbers come from snell_diffusion.core on random factors of a 48 x 48 layer (seed 0); nothing is
drawn by hand. The spectrum compares it with LoRA at the same number of trained values.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from snell_diffusion.core import (
    Allocator,
    distance_kernel,
    kept_count,
    linear_kernel,
    mix,
    sparsify,
)

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "how_snella_works.png"
SIDE, HEADS, COLUMNS = 48, 2, 4  # inputs = outputs, H, q: rank H q = 8
SPARSITY = 0.8
STEPS = 100
LAYERS = {"early": 0.5, "middle": 1.6, "late": 1.0}  # made-up sizes of each layer's gradients


def factors() -> tuple[Tensor, Tensor, Tensor]:
    """A [H, I, q], B [H, O, q] and signs [H] as the method starts them."""
    generator = torch.Generator().manual_seed(0)
    bound = (SIDE * COLUMNS) ** -0.5
    A, B = (torch.rand(HEADS, SIDE, COLUMNS, generator=generator) * 2 - 1 for _ in range(2))
    return A * bound, B * bound, torch.tensor([0.1, -0.1])


def matrix(axes: Axes, values: Tensor, title: str) -> None:
    """One [I, O] matrix, red above zero and blue below, white at zero."""
    limit = float(values.abs().max())
    axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("outputs")
    axes.set_ylabel("inputs")
    axes.set_xticks([])
    axes.set_yticks([])


def spectrum(axes: Axes, snella: Tensor, A: Tensor, B: Tensor) -> None:
    """Singular values of the SNELLA update and of a LoRA update from the same factors."""
    lora = linear_kernel(A, B, torch.ones(HEADS))
    for values, name in ((snella, "SNELLA"), (lora, f"LoRA, rank {HEADS * COLUMNS}")):
        singular = torch.linalg.svdvals(values)
        axes.semilogy((singular / singular[0]).clamp_min(1e-6), label=name)
    axes.set_title("singular values\n(largest = 1)", fontsize=10)
    axes.set_xlabel("index")
    axes.set_ylim(1e-6, 2)
    axes.legend(fontsize=8)


def competition(axes: Axes) -> None:
    """Kept share of three layers while the allocator takes the budget from all to 20 %."""
    sizes = dict.fromkeys(LAYERS, SIDE * SIDE)
    allocator = Allocator(sizes, 0.0, SPARSITY, STEPS // 10, STEPS // 5, 5, STEPS)
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, list[float]] = {name: [] for name in sizes}
    for step in range(STEPS):
        for name, size in LAYERS.items():
            A, gA, B, gB = torch.randn(4, HEADS, SIDE, COLUMNS, generator=generator)
            allocator.observe(name, A, size * gA, B, size * gB)
        allocator.update(step)
        for name, keep in allocator.keep().items():
            kept[name].append(keep / sizes[name])
    for name, shares in kept.items():
        axes.plot(shares, label=f"{name} layer")
    axes.set_title("competition across layers\n(one shrinking budget)", fontsize=10)
    axes.set_xlabel("training step")
    axes.set_ylabel("kept share")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8)


def main() -> None:
    A, B, signs = factors()
    K = distance_kernel(A, B, signs)
    w = mix(K, 1.0, 1.0, 0.0)
    delta = sparsify(w, SPARSITY)
    kept = kept_count(w.numel(), SPARSITY)
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    matrix(axes[0], K, "1  distances of two point sets\nK = Σ ± ‖A_i − B_o‖")
    matrix(axes[1], w, "2  mixed\nw = K + α softmax(K/γ) + β")
    matrix(axes[2], delta, f"3  sparse update Δ\n{kept} of {w.numel()} entries kept")
    spectrum(axes[3], delta, A, B)
    competition(axes[4])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=80, metadata={"Software": None})
    print(TARGET)


if __name__ == "__main__":
    main()
