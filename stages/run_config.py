"""Settings of a run: how rounds follow each other, and where and how it happens. No torch."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.section import NOT_IN_KEY, Section


class RoundsConfig(Section):
    """How rounds follow each other."""

    count: int = Field(1, ge=0)
    """Rounds of pseudo-labels and self-training; 0: the source model only."""
    fresh_pictures: bool = False
    """Write and paint anew in every round (else once, shared by all)."""
    overrides: dict[int, dict[str, Any]] = Field({})
    """Dotted overrides of single rounds: {2: {"refine.min_area": 2000}}."""


class RunConfig(Section):
    """Where and how a run happens; nothing here changes a result."""

    device: Annotated[str, NOT_IN_KEY] = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda, cuda:N."""
    beside: Annotated[int, NOT_IN_KEY] = Field(1, gt=0)
    """How many stages run at once: those whose inputs are there and which need nothing of each
    other, such as the legs' trainings. From 2 on each runs in a process of its own with its share
    of the cores (cores / beside threads, unless OMP_NUM_THREADS is set); those that compute on GPUs
    take different ones, and wait for one rather than share it."""
    processes: Annotated[int, NOT_IN_KEY] = Field(1, gt=0)
    """Processes on this machine: of a training, which share every update (through accelerate), and
    of painting, labelling and refining, which each make whole shards. The n-th takes the n-th
    GPU."""
    machines: Annotated[int, NOT_IN_KEY] = Field(1, gt=0)
    """Machines that share every update of a training, `processes` processes each. This one leads;
    on each of the others runs `python -m stages.join ARTIFACTS --machine N`."""
    engine: Annotated[Literal["local", "ray"], NOT_IN_KEY] = "local"
    """Who paints, labels and refines: processes of this machine, or the nodes of a running Ray
    cluster (found by RAY_ADDRESS), one task per shard with one GPU or core each. All nodes must see
    the artifacts folder, and this code, under the same paths."""
    shard_timeout_s: Annotated[float | None, NOT_IN_KEY] = Field(None, gt=0)
    """Kill one of several local processes that takes longer for a shard, and make the shard once
    more. The first shard includes loading the networks."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], NOT_IN_KEY] = "info"
    """Least severe log line shown."""
    stage_timeout_s: Annotated[float | None, NOT_IN_KEY] = Field(None, gt=0)
    """Kill a child process that runs longer (only where stages run in children: beside each other,
    and under Prefect, which retries once)."""
