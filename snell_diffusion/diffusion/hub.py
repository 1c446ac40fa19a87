"""Upload a finished run to the Hugging Face hub: checked before the run, done after all is written.

The token is what `hf auth login` stored or HF_TOKEN holds; no setting, file or log of a run has it.
Photos, class images, captions, checkpoints and the log stay here.
"""

from pathlib import Path
from typing import Any

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import UploadError

__all__ = ["require_hub", "upload"]

_LOGIN = "log in by `hf auth login`, or put a token with write access into HF_TOKEN"


def require_hub(config: TrainConfig) -> str | None:
    """The repository that a run will go to; None without push_to_hub.

    Asks the hub who the token belongs to, so that a wrong one is found before the training.

    Raises:
        SnellaConfigError: No token, a token that the hub refuses, no connection, or a bad name.
    """
    if not config.push_to_hub:
        return None
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if constants.HF_HUB_OFFLINE:
        raise SnellaConfigError(
            "push_to_hub needs the network, but HF_HUB_OFFLINE is set: unset it, or leave "
            "push_to_hub off and upload later by --push_to_hub --resume_from_checkpoint latest"
        )
    if get_token() is None:
        raise SnellaConfigError(f"push_to_hub needs a token of the Hugging Face hub: {_LOGIN}")
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SnellaConfigError(
            f"hub_model_id '{name}' cannot be a repository ({error}): give owner/name"
        ) from error
    try:
        user = HfApi().whoami()["name"]
    except Exception as error:  # whatever the client or its HTTP library raises
        raise SnellaConfigError(
            f"push_to_hub: the hub did not accept the token ({_first_line(error)}): {_LOGIN}"
        ) from error
    return name if "/" in name else f"{user}/{name}"


def upload(repository: str, config: TrainConfig, files: list[Path]) -> str:
    """Upload files of a run folder under their names there; returns the repository's address.

    Raises:
        UploadError: The hub refused, or cannot be reached; says how to upload later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, api = Path(config.output_dir), HfApi()
    operations: list[Any] = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files
    ]
    try:
        made = api.create_repo(repository, private=config.hub_private_repo or None, exist_ok=True)
        api.create_commit(
            repository, operations, commit_message="Adapter trained with snell_diffusion"
        )
    except Exception as error:  # whatever it is, the run itself is done and must not be lost
        raise UploadError(
            f"the run is complete in '{folder}', but uploading it to {repository} failed: "
            f"{_first_line(error)}. Try again with --resume_from_checkpoint latest, which trains "
            f"nothing anew. Do not upload the folder by hand: it also holds checkpoints, the log "
            f"and class images"
        ) from error
    return str(made)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300].rstrip(".")
