"""An exponential moving average of what is trained: the teacher of self-training."""

import torch

from models.segmenter import Segmenter


class Ema:
    """A shadow of a segmenter's trained parameters and the buffers beside them.

    Args:
        segmenter: what to follow; the shadow starts as a copy.
        decay: share of the shadow that stays at an update, in [0, 1).
        every: update once in this many steps (released CLOUDS: 0.999 every 100).
    """

    def __init__(self, segmenter: Segmenter, decay: float = 0.999, every: int = 1):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not in [0, 1)")
        if every < 1:
            raise ValueError(f"EMA every {every}: at least 1 step")
        self.decay = decay
        self.every = every
        self.shadow = {n: v.detach().clone() for n, v in segmenter.trained_state().items()}

    @torch.no_grad()
    def update(self, segmenter: Segmenter, step: int) -> None:
        """Move the shadow after optimizer step number `step` (from 1), if it is its turn."""
        if step % self.every:
            return
        state = segmenter.trained_state()
        floats = [n for n, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.shadow[n] for n in floats], [state[n] for n in floats], 1 - self.decay
        )
        for name in self.shadow.keys() - set(floats):
            self.shadow[name].copy_(state[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The shadow by parameter name."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a saved shadow.

        Raises:
            ValueError: other names than this shadow's.
        """
        if state.keys() != self.shadow.keys():
            strange = sorted(state.keys() ^ self.shadow.keys())
            raise ValueError(f"EMA state does not fit, differing names: {', '.join(strange[:5])}")
        for name, value in state.items():
            self.shadow[name].copy_(value)

    @torch.no_grad()
    def apply_to(self, segmenter: Segmenter) -> None:
        """Write the shadow into a segmenter."""
        state = segmenter.trained_state()
        for name, value in self.shadow.items():
            state[name].copy_(value)
