"""A base in shards trains the same adapter as a whole one: FSDP2 over gloo, two processes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from snell_diffusion.core import KernelUpdate
from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from tests.distributed.ranks import (
    adapter,
    events,
    largest_difference,
    ten_steps,
    train_to_the_end,
)
from tests.reliability.harness import ADAPTER, copy_run

pytestmark = pytest.mark.row("D4")


@dataclasses.dataclass(frozen=True)
class Run:
    settings: TrainConfig
    reports: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)


RUNS = {"one": (1, ""), "ddp": (2, ""), "fsdp": (2, "FSDP")}


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same ten steps on one process, on two with whole bases, on two with shards."""
    folder = tmp_path_factory.mktemp("fsdp")
    found = {}
    for name, (processes, strategy) in RUNS.items():
        settings = ten_steps(tiny_base, folder / name, train_batch_size=2 // processes)
        watch = watch_matrices(folder / name) if strategy else lambda rank: None
        reports = train_to_the_end(processes, settings, strategy=strategy, install=watch)
        found[name] = Run(settings, reports)
    return found


def watch_matrices(folder: Path) -> Callable[[int], None]:
    """Note what the masks are computed from, and where the base lies, in `folder`."""

    def install(rank: int) -> None:
        measure, finish = KernelUpdate.measure, training.Trainer._finish
        seen: dict[str, Any] = {"inputs": [], "shapes": []}

        def watched(self: Any, params: Any, scratch: Any) -> Any:
            A, B = params[:2]
            statistics, w = measure(self, params, scratch)
            seen["inputs"] += [type(t).__name__ for t in (A, B, *statistics) if type(t) is DTensor]
            seen["shapes"].append([A.shape[1], B.shape[1], *w.T.shape])
            return statistics, w

        def finished(self: Any) -> Any:
            unet = self._model.denoiser
            # What ran last may still be gathered.
            for part in unet.modules():
                if hasattr(part, "reshard"):
                    part.reshard()
            frozen = [p for n, p in unet.named_parameters() if "snella_" not in n]
            seen["sharded"] = sum(isinstance(p, DTensor) for p in frozen)
            seen["frozen"] = len(frozen)
            seen["here"] = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
            seen["all"] = sum(p.numel() for p in frozen)
            (folder / f"matrices{rank}.json").write_text(json.dumps(seen))
            return finish(self)

        KernelUpdate.measure = watched  # type: ignore[method-assign]
        training.Trainer._finish = finished  # type: ignore[method-assign]

    return install


def test_two_processes_with_shards_train_what_one_does(runs: dict[str, Run], row: Any) -> None:
    first, second = runs["fsdp"].reports
    for part in ("adapter", "optimizer", "allocator"):
        assert first[part] == second[part], f"{part} differs between the processes"
    difference = largest_difference(adapter(runs["one"].settings), adapter(runs["fsdp"].settings))
    row.figure(f"largest difference {difference:.1e}")
    assert difference <= 1e-6


def test_layers_are_allocated_as_with_whole_bases(runs: dict[str, Run]) -> None:
    ddp, fsdp = runs["ddp"], runs["fsdp"]
    assert ddp.reports[0]["exchanged"][1:] == fsdp.reports[0]["exchanged"][1:]
    assert len(fsdp.reports[0]["exchanged"]) > 5
    for whole, sharded in zip(
        events(ddp.settings, "allocation"), events(fsdp.settings, "allocation"), strict=True
    ):
        for key in ("name", "size", "level", "budget", "kept"):
            assert [r[key] for r in whole["layers"]] == [r[key] for r in sharded["layers"]], key


@pytest.mark.parametrize("rank", [0, 1])
def test_masks_are_computed_on_whole_matrices_beside_a_sharded_base(
    runs: dict[str, Run], row: Any, rank: int
) -> None:
    seen = json.loads((runs["fsdp"].folder.parent / f"matrices{rank}.json").read_text())
    assert seen["inputs"] == []
    sizes = {(i, o) for _, _, i, o in seen["shapes"]}
    assert all([a, b] == [i, o] for a, b, i, o in seen["shapes"])
    rows = events(runs["fsdp"].settings, "allocation")[-1]["layers"]
    assert {i * o for i, o in sizes} == {layer["size"] for layer in rows}
    assert seen["sharded"] == seen["frozen"]
    assert seen["here"] == pytest.approx(seen["all"] / 2, rel=0.05)
    row.figure(f"each process holds {seen['here'] / seen['all']:.0%} of the base")


@pytest.mark.parametrize("processes, strategy", [(1, ""), (2, ""), (2, "FSDP")])
def test_a_checkpoint_with_shards_opens_everywhere(
    runs: dict[str, Run], tmp_path: Path, processes: int, strategy: str
) -> None:
    run = runs["fsdp"]
    folder = copy_run(run.folder, tmp_path / "run")
    (folder / ADAPTER).unlink()
    settings = dataclasses.replace(
        run.settings,
        output_dir=str(folder),
        train_batch_size=2 // processes,
        resume_from_checkpoint="latest",
    )
    for report in train_to_the_end(processes, settings, strategy=strategy):
        for part in ("step", "adapter", "optimizer", "allocator"):
            assert report[part] == run.reports[0][part], part
    assert (folder / ADAPTER).read_bytes() == (run.folder / ADAPTER).read_bytes()


EVERYTHING: dict[str, Any] = {
    "max_train_steps": 4,
    "train_text_encoder": True,
    "gradient_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "with_prior_preservation": True,
    "class_prompt": "a cat",
    "num_class_images": 3,
    "sample_batch_size": 2,
    "validation_prompt": "a sks cat",
    "ema_decay": 0.9,
    "cache_latents": False,
    "dataloader_num_workers": 1,
}


def test_shards_serve_text_encoders_class_images_and_samples(
    tiny_base: Path, tmp_path: Path, row: Any
) -> None:
    """Gathered for recomputed activations too; pictures come out with the same bytes."""
    runs = {}
    for name, (processes, strategy) in {k: RUNS[k] for k in ("one", "fsdp")}.items():
        settings = ten_steps(
            tiny_base, tmp_path / name, train_batch_size=2 // processes, **EVERYTHING
        )
        train_to_the_end(processes, settings, strategy=strategy)
        runs[name] = settings
    difference = largest_difference(adapter(runs["one"]), adapter(runs["fsdp"]))
    row.figure(f"with all options: largest difference {difference:.1e}")
    assert difference <= 1e-6
    pictures = {name: pictures_of(Path(settings.output_dir)) for name, settings in runs.items()}
    assert len(pictures["one"]) == 3 + 2
    assert pictures["one"] == pictures["fsdp"]
    whole, sharded = (events(runs[name], "validation")[-1] for name in ("one", "fsdp"))
    for number in ("validation_loss_base", "validation_loss", "drift"):
        assert sharded[number] == pytest.approx(whole[number], rel=1e-4), number


def pictures_of(folder: Path) -> dict[str, bytes]:
    """Class images and sample sheets by name."""
    files = [*folder.glob("class_images/*.png"), *folder.glob("samples/*.png")]
    return {file.name: file.read_bytes() for file in files}


class Borders(torch.autograd.Function):
    """Hands tensors through, so that the gradients inside a block are summed before the others."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Any:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def sum_gradients_by_block(rank: int) -> None:
    """Let a whole base add its 16-bit gradients in the order of a sharded one."""
    from torch.utils import _pytree

    from snell_diffusion.training.parallel import Replicated
    from snell_diffusion.training.parallel.fsdp import indivisible

    def border(module: nn.Module, args: Any, kwargs: Any) -> Any:
        flat, form = _pytree.tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        for i, x in zip(places, Borders.apply(*(flat[i] for i in places)), strict=True):
            flat[i] = x
        return _pytree.tree_unflatten(flat, form)

    prepare = Replicated.prepare

    def prepared(self: Replicated, components: Any, optimizer: Any) -> Any:
        for model in components.values():
            for part in [*indivisible(model), model]:
                part.register_forward_pre_hook(border, with_kwargs=True)
        return prepare(self, components, optimizer)

    Replicated.prepare = prepared  # type: ignore[method-assign]


def test_shards_of_a_16_bit_base_are_gathered_in_both_passes(
    tiny_base: Path, tmp_path: Path
) -> None:
    """bfloat16 rounds gradients where blocks meet, so the order of the sums is made the same."""
    one = ten_steps(tiny_base, tmp_path / "one", train_batch_size=2, mixed_precision="bf16")
    two = ten_steps(tiny_base, tmp_path / "two", train_batch_size=1, mixed_precision="bf16")
    train_to_the_end(1, one, install=sum_gradients_by_block)
    train_to_the_end(2, two, strategy="FSDP")
    assert largest_difference(adapter(one), adapter(two)) <= 1e-6
