"""Bundles in repositories of the Hugging Face hub, through its own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcvgg.errors import FcvggError, LoadError, one_line
from fcvgg.serialization.bundle import is_bundle
from fcvgg.serialization.model_card import CARD
from fcvgg.serialization.saved_files import read_description
from fcvgg.serialization.tensor_table import CONFIG, TENSORS
from fcvgg.support.extras import imported

PREFIX = "hf:"
EXTRA = "hub"


def download_bundle(name: str) -> Path:
    """The folder of a bundle in the client's cache, where it is downloaded unless it is there.

    Args:
        name: ``user/name``, or ``user/name@revision`` with a branch, tag or commit.

    Raises:
        LoadError: if there is no such repository, or it holds no bundle, or cannot be reached.
        MissingExtraError: if huggingface_hub is not installed.
    """
    api = imported("huggingface_hub", EXTRA).HfApi(library_name="fcvgg")
    repository, _, revision = name.partition("@")
    with explained(PREFIX + name, LoadError, "a bundle of fcvgg, which net.push_to_hub writes"):
        check_reachable(name)
        config = api.hf_hub_download(repository, CONFIG, revision=revision or None)
        folder = Path(config).parent
        if is_bundle(folder):
            # of the same commit, for which the folder is named
            api.hf_hub_download(repository, TENSORS, revision=folder.name)
            return folder
    described = read_description(folder / CONFIG, "a bundle of fcvgg")
    if "pretrained_cfg" in described:
        remedy = f"pass timm:hf-hub:{name}"
    elif "model_type" in described:
        remedy = "load it with transformers and use fcvgg.convert"
    else:
        remedy = "net.push_to_hub writes one"
    raise LoadError(f"{PREFIX}{name} must be a bundle of fcvgg, got another model; {remedy}")


def upload_bundle(folder: Path, name: str, private: bool | None, message: str | None) -> str:
    """Write a bundle to a repository, which is made unless it is there; gives its address.

    Args:
        folder: the bundle.
        name: ``user/name``, or ``user/name@branch``.
        private: whether a new repository is private; the account's default when None.
        message: of the commit.

    Raises:
        FcvggError: if it cannot be written.
        MissingExtraError: if huggingface_hub is not installed.
    """
    api = imported("huggingface_hub", EXTRA).HfApi(library_name="fcvgg")
    name = name.removeprefix(PREFIX)
    repository, _, branch = name.partition("@")
    with explained(PREFIX + name, FcvggError):
        address = api.create_repo(repository, private=private, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch or None,
            commit_message=message or "A fully convolutional network of fcvgg",
            allow_patterns=[CONFIG, TENSORS, CARD],
        )
    return str(address)


def check_reachable(name: str) -> None:
    """Ask for a repository that is not in the client's cache once, for 10 seconds.

    The client itself would ask for each file six times in half a minute where there is no
    connection, and log every time.

    Args:
        name: ``user/name`` or ``user/name@revision``.
    """
    client = imported("huggingface_hub", EXTRA)
    repository, _, revision = name.partition("@")
    revision = revision or None  # type: ignore[assignment]
    if client.try_to_load_from_cache(repository, CONFIG, revision=revision) is None:
        client.HfApi(library_name="fcvgg").model_info(repository, revision=revision, timeout=10)


@contextmanager
def explained(where: str, kind: type[FcvggError], what: str = "a model") -> Iterator[None]:
    """What the client raises, in one line that names the repository.

    Args:
        where: the repository, as the user writes it.
        kind: the error's class.
        what: what the repository is to hold.
    """
    errors = imported("huggingface_hub.errors", EXTRA)
    login = "log in with 'hf auth login'"
    try:
        yield
    except FcvggError:
        raise
    except errors.HFValidationError as error:
        raise kind(f"a repository must be user/name or user/name@revision, got {where}") from error
    except errors.GatedRepoError as error:
        raise kind(f"{where} is gated; accept its terms on its page, then {login}") from error
    except errors.RevisionNotFoundError as error:
        raise kind(f"{where} has no such revision; check the name after '@'") from error
    except errors.RemoteEntryNotFoundError as error:
        raise kind(f"{where} must hold {what}, got none of its files") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        # 401 also where the token is missing or wrong: the hub does not tell private from absent
        if kind is LoadError and status in (401, 404):
            raise kind(
                f"{where} does not exist or is private; check the name, or {login}"
            ) from error
        remedy = f"{login}, with a token that may do this" if status in (401, 403) else "try again"
        raise kind(f"the hub refused {where} with status {status}; {remedy}") from error
    except Exception as error:  # of the client's transport, which changes between its versions
        raise kind(
            f"{where} cannot be had: the hub could not be reached ({_cause_of(error)}); check the "
            "connection, HF_HUB_OFFLINE and HF_ENDPOINT"
        ) from error


def _cause_of(error: BaseException) -> str:
    """The innermost reason: the client's own words for it speak of its cache."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).rstrip(". ")
