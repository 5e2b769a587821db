"""Uploads the final model to the HuggingFace Hub: `--push-to-hub`."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from forge_lib.errors import UserError, first_line

logger = logging.getLogger("forge")


def check_hub(name: str) -> None:
    """Checks, before the training, that `--push-to-hub` can work.

    Raises:
        UserError: the name is not valid, or this machine has no token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: {first_line(error)}") from None
    if not get_token():
        raise UserError("--push-to-hub needs a token: run `hf auth login` on the main machine, or set HF_TOKEN")


def push_to_hub(folder: Path, name: str) -> None:
    """Uploads a model folder; a failure is logged, with the command that repeats it, and not raised."""
    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload the model")
    except Exception as error:  # of the Hub, its storage, or the network: several libraries, each with its own
        logger.error(f"--push-to-hub {name}: {first_line(error)}; repeat it with `hf upload {name} {folder} .`")
        return
    logger.info(f"the model is at {api.endpoint}/{repository}")
