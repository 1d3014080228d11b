"""What a language model answers, here or on a server. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model wrote."""

    text: str
    finished: bool
    """Whether it ended the reply itself, rather than at the token limit."""
