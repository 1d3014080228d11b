"""Files of tensors, read so that no code in them is ever run.

    state = read_tensors(Path("sam_vit_h_4b8939.pth"), option="refine.weights")

safetensors files hold nothing but tensors; all others are unpickled weights-only.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_tensors(file: Path, *, option: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint file, by name, on the CPU.

    Args:
        file: a `.safetensors` file, or one that `torch.save` wrote.
        option: config field that named it, for messages.

    Raises:
        ValueError: it is damaged, holds something else than tensors, or would run code.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(unreadable(f"{option}: {file}", error)) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{option}: {file} holds a {type(state).__name__}, not tensors.")
    return state


@contextmanager
def refusing_code(what: str) -> Iterator[None]:
    """Turn a library's refusal to unpickle more than tensors into a message for people.

    Args:
        what: option and file (or model), for the message.

    Raises:
        ValueError: in place of the unpickler's error, however wrapped, or of a damaged
            safetensors file's, or of a TorchScript program's.
    """
    try:
        yield
    except Exception as error:
        for reason in _chain(error):
            if isinstance(reason, UnpicklingError | SafetensorError) or _is_program(reason):
                raise ValueError(unreadable(what, reason)) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_program(error: BaseException) -> bool:
    """Whether torch refused a file because it holds a TorchScript program."""
    return isinstance(error, RuntimeError) and "TorchScript" in str(error)


def unreadable(what: str, error: BaseException) -> str:
    """The message for a file that cannot be read as plain tensors."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = next((line for line in lines if "GLOBAL" in line), lines[0])[:200].rstrip(".")
    if _is_program(error):
        return (
            f"{what} is a TorchScript program (as OpenAI's own CLIP files are), which is never "
            "run: take its weights as .safetensors, or open_clip's tag (openai)."
        )
    return (
        f"{what} cannot be read as a checkpoint of plain tensors ({reason}). Is it whole? Files "
        "that would run code are never read: ask for its weights as .safetensors."
    )
