"""Settings of the data: label space, data sets, the miniature's streets, indexing. No torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.section import NOT_IN_KEY, Section

_TAKEN_NAMES = {
    "roots": "is a file beside the indexes (roots.json)",
    "painted": "begins the ids of painted pictures",
}


LayoutName = Literal[
    "cityscapes", "pairs", "folder", "gta5", "synthia", "bdd100k", "mapillary", "acdc", "urbansyn"
]


class DatasetConfig(Section):
    """One data set on disk."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in ids ("name/stem"), tables and the report."""
    layout: LayoutName = "cityscapes"
    """On-disk layout as released (`stages/layouts.py` lists the folders of each); pairs: data of
    one's own, `images/` and `labels/*.png` of the same names; folder: any folder of images without
    labels."""
    root: str
    """Folder of the data set: absolute, below `data.root`, or `@render_world/PART` for the
    miniature's own streets."""
    split: str | None = None
    """Split below the layout's folders ("train", "val"; of ACDC also one condition, "night/val");
    None: the only one, or the usual one of the data set's role."""
    label_map: str | None = None
    """Name of the raw-id map in the label space file; None: of a target the one that
    `evaluate.protocol` names, else the layout's usual one."""
    limit: int | None = Field(None, gt=0)
    """Take this many samples, evenly spaced over the sorted ones; None: all."""
    truth: bool = False
    """Under `data.unlabelled`: read the labels too, never to train on, but to tell how good
    pseudo-labels are before and after refinement."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, name: str) -> str:
        if name in _TAKEN_NAMES:
            raise ValueError(f"{name!r} {_TAKEN_NAMES[name]}: give the data set another name")
        return name


class DataConfig(Section):
    """Label space and data sets."""

    root: Annotated[str, NOT_IN_KEY] = "."
    """Folder that relative data set roots are below (counts through what is found there)."""
    labels: str = "cityscapes19"
    """Label space: a name in `stages/labelspaces/` or a YAML file of the same form."""
    sources: tuple[DatasetConfig, ...] = ()
    """Labelled sets to train on."""
    targets: tuple[DatasetConfig, ...] = ()
    """Labelled sets of unseen domains, for judgement only."""
    validation: tuple[DatasetConfig, ...] = ()
    """Labelled sets for choices (stopping, thresholds); never a target."""
    unlabelled: tuple[DatasetConfig, ...] = ()
    """Pictures that `synthesize` may collect instead of painting."""

    @model_validator(mode="after")
    def _truth_of_the_unlabelled(self) -> Self:
        """Elsewhere labels are read anyway."""
        for dataset in (*self.sources, *self.targets, *self.validation):
            if dataset.truth:
                raise ValueError(
                    f"data set {dataset.name!r} sets truth, which belongs under data.unlabelled "
                    f"only: the labels of sources, targets and validation sets are read anyway"
                )
        return self

    @model_validator(mode="after")
    def _validation_is_no_target(self) -> Self:
        """What choices are made on is no unseen domain any more."""
        targets = {_place(dataset): dataset.name for dataset in self.targets}
        names = {dataset.name for dataset in self.targets}
        for dataset in self.validation:
            if dataset.name in names or _place(dataset) in targets:
                target = targets.get(_place(dataset), dataset.name)
                raise ValueError(
                    f"validation set {dataset.name!r} is also the target {target!r}: choices must "
                    f"not be made on what is judged as unseen; take another set for one of them"
                )
        return self


def _place(dataset: DatasetConfig) -> tuple[str, str]:
    """Where the pictures of a target or validation set lie: both mean split "val" by default."""
    return dataset.root.rstrip("/"), dataset.split or "val"


class WorldConfig(Section):
    """The miniature's streets (`render_world`), rendered only where a data set's root is
    `@render_world/...`."""

    height: int = Field(64, ge=32, multiple_of=32)
    """Picture height in pixels."""
    width: int = Field(128, ge=32, multiple_of=32)
    """Picture width in pixels."""
    num_source: int = Field(600, gt=0)
    """Labelled source pictures."""
    num_target: int = Field(100, gt=0)
    """Pictures per target domain."""
    num_web: int = Field(0, ge=0)
    """Many-style pictures to collect; their labels are there for `truth` only."""
    num_web_val: int = Field(100, ge=0)
    """Labelled many-style pictures for choices."""
    seed: int = Field(0, ge=0)
    """Seed of every street."""


class PrepareConfig(Section):
    """Index the data sets."""

    on_corrupt: Literal["error", "skip"] = "error"
    """A picture or label that cannot be read: stop and name it, or leave it out and count it."""
    on_size_mismatch: Literal["error", "skip", "resize_label"] = "error"
    """Picture and label of different size: stop and name it, leave it out, or resize the label
    (nearest)."""
    workers: Annotated[int, NOT_IN_KEY] = Field(2, ge=0)
    """Processes that read and digest files."""
