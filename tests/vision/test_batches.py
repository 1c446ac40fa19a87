"""Which images a step sees, and that their gradient does not depend on how a step is shared."""

from pathlib import Path

import pytest
import torch

from snell_diffusion.vision.batches import ClassificationLoss, Order
from snell_diffusion.vision.data import Inputs, Preprocess, load_task, read_processor
from snell_diffusion.vision.loading import load_base
from snell_diffusion.vision.measure import Measurement
from tests.vision import runs


class Rank:
    """One of several processes, as far as a loss asks."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.device = rank, world, torch.device("cpu")


@pytest.mark.parametrize("size, batch", [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_every_epoch_shows_every_image_once(size: int, batch: int) -> None:
    order = Order(size, batch, seed=0)
    assert order.per_epoch == -(-size // batch)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * order.per_epoch + 1, (epoch + 1) * order.per_epoch + 1)
        assert {order.epoch_of(step) for step in steps} == {epoch}
        images = [order.images(step) for step in steps]
        assert all(0 < len(some) <= batch for some in images)
        epochs.append([i for some in images for i in some])
        assert sorted(epochs[-1]) == list(range(size))
    if size > 3:
        assert epochs[0] != epochs[1]
    assert Order(size, batch, seed=0).images(2) == Order(size, batch, seed=0).images(2)


def test_gradient_does_not_depend_on_how_a_step_is_shared(
    bases: dict[str, str], pictures: Path
) -> None:
    """One process; two; two micro-batches; three slots for the four images left over."""
    config = runs.config(bases["vit"], pictures, None, label_smoothing=0.1)
    base = load_base(bases["vit"], 3)
    base.model.classifier.requires_grad_(True)
    task = load_task(config, 0, "validation")
    shown = Preprocess.of(config, read_processor(bases["vit"]), runs.SIDE)
    inputs = Inputs(task.train, shown, True, config)
    found = []
    for world, micros in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 12)):
        changed = runs.config(
            bases["vit"], pictures, None, label_smoothing=0.1, gradient_accumulation_steps=micros
        )
        total, losses, right = 0.0, 0.0, 0.0
        for rank in range(world):
            order = Order(len(inputs), 10, seed=0)  # 24 images: the third step has 4
            loss_at = ClassificationLoss(
                changed, base.family, base.model, inputs, order, Rank(rank, world)
            )
            for micro in range(micros):
                loss, parts = loss_at(3, micro)
                (gradient,) = torch.autograd.grad(loss, [base.model.classifier.weight])
                total = total + gradient / micros / world
                losses += loss.item() / micros / world
                right += float(parts["accuracy"]) / micros / world
        found.append((total, losses, right))
    images = Order(len(inputs), 10, seed=0).images(3)
    assert len(images) == 4
    scores = base.family.logits(base.model, inputs.pixels(images))
    expected = torch.nn.functional.cross_entropy(scores, inputs.labels(images), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(expected, [base.model.classifier.weight])
    share = (scores.argmax(-1) == inputs.labels(images)).float().mean().item()
    for total, losses, right in found:
        torch.testing.assert_close(total, gradient, rtol=1e-5, atol=1e-7)
        assert losses == pytest.approx(expected.item(), rel=1e-5)
        assert right == pytest.approx(share)


def test_measurement() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    found = Measurement(0.5, predicted, labels)
    assert (found.right, found.accuracy) == (3, 0.6)
    assert found.confusion(3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert found.per_class(3) == [0.5, pytest.approx(2 / 3), None]


def test_objective_counts_errors_first() -> None:
    """Fewer errors win whatever the loss; at equal errors the lower loss does."""
    labels = torch.zeros(4, dtype=torch.int64)

    def objective(errors: int, loss: float) -> float:
        predicted = torch.tensor([1] * errors + [0] * (4 - errors))
        return Measurement(loss, predicted, labels).objective

    ranked = [(0, 0.1), (0, 50.0), (1, 0.01), (1, 2.0), (1, float("inf")), (4, 0.0)]
    values = [objective(*one) for one in ranked]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert objective(1, float("nan")) != objective(1, float("nan"))
