"""The training script's own step on an embedded base, as `make demo` runs it, by several methods.

LoRA and our merged path run exactly what the script runs with `--method lora` and `--method
snella`, the competition of the layers included. For the others their layers are put in place of
those, and nothing competes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from benchmarks.counting import Cost, count
from benchmarks.methods import ADAPTER
from benchmarks.plain import make_plain
from benchmarks.results import ROOT
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config, read_config
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import build_loss
from snell_diffusion.diffusion.optimization import (
    build_scheduler,
    build_state,
    loop_settings,
    start_processes,
)
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.setup import build_model
from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.training.loop import TrainState, train
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.tuners import delta_layers

METHODS = ("full", "lora", "plain", "ours")
_PHOTOS, _SIDE = 5, 256


class TrainerStep:
    """One run of the training script, to be continued step by step.

    Args:
        config: The run.
        method: One of METHODS.
        parallel: Device and precision.
        closing: Ends what the run leaves open.
    """

    def __init__(
        self, config: TrainConfig, method: str, parallel: Parallel, closing: ExitStack
    ) -> None:
        config = replace(config, method="lora" if method == "lora" else "snella")
        photos = Photos.find(config, RunFolder(config))
        self._model = build_model(config, parallel.device, parallel)
        self.components = self._model.components
        if method == "full":
            self._train_everything()
        if method == "plain":
            for component in self.components.values():
                make_plain(component, ADAPTER)
        usual = method in ("lora", "ours")
        self._state = (
            build_state(config, self.components, parallel) if usual else self._own_state(config)
        )
        self._loss = build_loss(config, self._model, photos.instance, [], parallel, closing)
        self._settings, self._parallel = loop_settings(config), parallel

    def _train_everything(self) -> None:
        """The base without its adapters, all of it trained."""
        for component in self.components.values():
            for path, layer in list(delta_layers(component, ADAPTER)):
                component.set_submodule(path, layer.get_base_layer())
            component.requires_grad_(True)

    def _own_state(self, config: TrainConfig) -> TrainState:
        trained = list(trainable_parameters(self.components).values())
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, fused=True)
        return TrainState(self.components, optimizer, build_scheduler(config, optimizer))

    def __call__(self) -> None:
        """The next step of the loop."""
        settings = replace(self._settings, steps=self._state.step + 1)
        # Without a handler of signals: nothing here has a state to save.
        train(self._state, self._loss, settings, self._parallel, lambda _: None, StopRequest())

    def cost(self) -> Cost:
        """Count forward and backward pass of the next step."""
        tensors = [
            tensor
            for part in self._model.pipe.components.values()
            if isinstance(part, torch.nn.Module)
            for tensor in (*part.parameters(), *part.buffers())
        ]
        step = self._state.step + 1
        found = count(lambda: self._loss(step, 0)[0], tensors)
        self._state.optimizer.zero_grad(set_to_none=True)
        return found


@contextmanager
def trainer_steps(
    config_file: str, methods: tuple[str, ...] = METHODS, **changes: Any
) -> Iterator[dict[str, TrainerStep]]:
    """The runs of one config by every method, on photos of noise in a folder of their own.

    Args:
        config_file: Name in configs/dreambooth.
        methods: Some of METHODS.
        changes: Of the config's settings.
    """
    path = ROOT / "configs" / "dreambooth" / config_file
    with TemporaryDirectory() as folder, ExitStack() as closing:
        _write_photos(Path(folder))
        values = {
            **read_config(path),
            "instance_data_dir": folder,
            "validation_data_dir": None,
            "output_dir": f"{folder}/run",
            **changes,
        }
        config = make_config(values, str(path))
        parallel = start_processes(config)
        closing.callback(AcceleratorState._reset_state)
        yield {m: TrainerStep(config, m, parallel, closing) for m in methods}


def _write_photos(folder: Path) -> None:
    for index in range(_PHOTOS):
        pixels = np.random.default_rng(index).integers(0, 255, (_SIDE, _SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
