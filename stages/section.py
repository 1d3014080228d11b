"""What every section of a configuration is: frozen, without unknown keys. No torch.

A field whose annotation carries `NOT_IN_KEY` cannot change a stage's result and stays out of its
key; one that carries `IN_KEY_IF_SET` counts there only where it is not at its default.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class NotInKey:
    """Marks a field that cannot change a result (paths, devices, worker counts, log intervals)."""


NOT_IN_KEY = NotInKey()


class InKeyIfSet:
    """Marks a field that came later than artifacts worth keeping, whose default changes nothing.

    At its default it stays out of the key, so that they are found again.
    """


IN_KEY_IF_SET = InKeyIfSet()


def refuse_gaps(*, window: int, stride: int) -> None:
    """Sliding windows must touch: pixels between them would get no score at all.

    Raises:
        ValueError: the step is larger than the window.
    """
    if stride > window:
        raise ValueError(
            f"stride {stride} is larger than window {window}: windows would leave gaps. Choose a "
            "smaller stride."
        )


def _real_scales(scales: tuple[float, ...]) -> tuple[float, ...]:
    if not scales or min(scales) <= 0:
        raise ValueError(f"{list(scales)} must hold at least one scale, all of them above 0")
    return scales


Scales = Annotated[tuple[float, ...], AfterValidator(_real_scales)]
"""Scales of a picture, 1 its own size, to average scores over."""


class Section(BaseModel):
    """A frozen, keyword-only section; unknown keys are errors, docstrings become descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
