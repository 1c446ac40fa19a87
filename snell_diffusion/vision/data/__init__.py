"""Images of classification tasks: layouts on disk, splits, few-shot choice, preprocessing."""

from snell_diffusion.vision.data.inputs import Inputs
from snell_diffusion.vision.data.load import load_task
from snell_diffusion.vision.data.preprocess import Preprocess, read_processor
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Split, Task, few_shot

__all__ = [
    "Data",
    "Inputs",
    "Preprocess",
    "Split",
    "Task",
    "few_shot",
    "load_task",
    "read_processor",
]
