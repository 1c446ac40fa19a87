"""What a base model is: its class, and a hash of the settings that differ from its defaults.

Only differences count, so that a library release which adds an option with a default leaves the
hash of an unchanged model alone.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

# Where the weights came from, in which precision they are, who wrote them: not what they are.
# `sample_size` is the picture size a base was trained at; it changes no weight we adapt. Names of
# classes belong to a head, which adapters leave alone.
_VOLATILE = {
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "name_or_path",
    "num_labels",
    "quantization_config",
    "sample_size",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}


def model_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of a diffusers or transformers model that differ from its class's defaults.

    A module without a `config` has none.
    """
    config = getattr(model, "config", None)
    if config is None:
        return {}
    if hasattr(config, "to_diff_dict"):
        settings = config.to_diff_dict()
    elif isinstance(config, Mapping):
        parameters = inspect.signature(type(model).__init__).parameters
        defaults = {name: item.default for name, item in parameters.items()}
        settings = {
            name: value
            for name, value in config.items()
            if _plain(value) != _plain(defaults.get(name, inspect.Parameter.empty))
        }
    else:
        return {}
    return {
        name: _plain(value)
        for name, value in sorted(settings.items())
        if name not in _VOLATILE and not name.startswith("_")
    }


def config_hash(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of a model's `model_settings`."""
    text = json.dumps(model_settings(model), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
