"""Settings that do nothing because of another one: told at the start, for the run is sound."""

import dataclasses

from snell_diffusion.diffusion.config import TrainConfig

# The setting that one needs: changed from its default, or to the value that stands with it.
_NEEDS = {
    "torch_compile_backend": "torch_compile",
    "unmasked_weight": "masked_loss",
    "prior_loss_weight": "with_prior_preservation",
    "text_encoder_rank": "train_text_encoder",
    "text_encoder_lr": "train_text_encoder",
    "token_learning_rate": "new_tokens",
    "lr_warmup_steps": "lr_scheduler",
    "lr_num_cycles": "lr_scheduler cosine_with_restarts",
    "lr_power": "lr_scheduler polynomial",
    "early_stopping_min_delta": "early_stopping_patience",
    "hub_private_repo": "push_to_hub",
}


def idle_settings(config: TrainConfig) -> list[str]:
    """A line for every setting that was changed and has no effect."""
    changed = {f.name for f in dataclasses.fields(config) if _changed(config, f)}
    lines = []
    for setting in sorted(changed & _NEEDS.keys()):
        partner, _, wanted = _NEEDS[setting].partition(" ")
        found = getattr(config, partner)
        if partner not in changed or (wanted and found != wanted):
            lines.append(f"{setting} has no effect, since {partner} is {found or 'not given'}")
    return lines


def _changed(config: TrainConfig, field: dataclasses.Field) -> bool:
    default = field.default_factory() if callable(field.default_factory) else field.default
    return getattr(config, field.name) != default
