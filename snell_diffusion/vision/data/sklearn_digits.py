"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8x8 pixels, 10 classes.

They are the test part of a UCI data set by 13 writers; which image is whose is not recorded, so
writers of the test split also wrote training images.
"""

import numpy as np
import torch

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.data.pictures import Arrays
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Split, Task, parted


def read(config: Data) -> Task:
    """Read the digits, parted by class with `split_seed`.

    Raises:
        SnellaConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SnellaConfigError(
            "dataset digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    found = load_digits()
    # 17 grey levels, 0 to 16, bright strokes on black.
    values = np.clip(np.rint(found.images * (255 / 16)), 0, 255).astype(np.uint8)
    labels = torch.tensor(found.target.tolist(), dtype=torch.int64)
    keys = [f"digit-{index:04d}" for index in range(len(values))]
    whole = Split("all", labels, keys, Arrays(list(values)))
    shares = (config.test_fraction, config.validation_fraction)
    test, validation, train = parted(labels, shares, config.split_seed)
    return Task(
        "digits",
        tuple(str(digit) for digit in range(10)),
        whole.subset(train, "train"),
        whole.subset(validation, "validation"),
        whole.subset(test, "test"),
    )
