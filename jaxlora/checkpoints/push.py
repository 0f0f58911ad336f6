"""Push a folder to the Hugging Face Hub: new repositories are private, public ones need explicit consent.

    hub = open_hub("OWNER/NAME", public=False)       # before anything is written: is this allowed?
    address = push_folder(hub, Path("adapter"))

The Hub client finds its own key (`HF_TOKEN`, or `hf auth login`); it is neither read nor written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import is_hub_name
from jaxlora.runtime.text import harmless, without_secrets


@dataclass(frozen=True)
class Hub:
    """A repository that may be written to."""

    api: Any
    name: str
    public: bool
    exists: bool


def open_hub(name: str, public: bool) -> Hub:
    """Check the repository to push to; nothing is created yet.

    Raises:
      UserError: invalid name, no key or no network; or the repository is public and `public` is false.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if not is_hub_name(name):
        raise UserError(f"--push: {name!r:.100} is not OWNER/NAME (or is a folder here)")
    if huggingface_hub.get_token() is None:
        raise UserError("--push: the Hub needs a token; export HF_TOKEN, or run `hf auth login`")
    api = huggingface_hub.HfApi()
    try:
        private = api.repo_info(name).private
    except RepositoryNotFoundError:
        return Hub(api, name, public, exists=False)
    except Exception as error:  # the Hub client raises many kinds
        raise UserError(f"--push: {name}: {_line(error)}") from None
    if not private and not public:
        raise UserError(
            f"--push: {name} is a public repository; confirm with --public that anyone may read this"
        )
    return Hub(api, name, public, exists=True)


def push_folder(hub: Hub, folder: Path) -> str:
    """Create the repository if it does not exist, and upload a folder's files in one commit.

    Returns:
      the repository's address.

    Raises:
      UserError: the Hub refuses it.
    """
    try:
        if not hub.exists:
            hub.api.create_repo(hub.name, private=not hub.public)
        hub.api.upload_folder(
            repo_id=hub.name, folder_path=str(folder), commit_message="Upload what a run of jaxlora selected"
        )
    except Exception as error:
        raise UserError(f"--push: {hub.name}: {_line(error)}; {folder} is complete; push it again") from None
    return f"https://huggingface.co/{hub.name}"


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return harmless(without_secrets(text))
