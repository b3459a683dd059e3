"""Recalibrate a torch model when Lightning's trainer has fitted it; needs the package lightning."""

from __future__ import annotations

from typing import Any

from evennorm.errors import MissingExtra

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtra("evennorm.torch.lightning", "lightning", error.name) from error


class Recalibrate(Callback):
    """Set the running statistics to the exact ones of data when training ends, as `evennorm.tools.recalibrate` does.

    The module's `forward` is called with the inputs of each batch. Nothing is read during training. A resumed training takes
    the statistics anew when it ends. Checkpoints that were written during training hold the statistics of training: call
    `trainer.save_checkpoint` after `fit`, or recalibrate the model of the best checkpoint. Where several processes train,
    give each of them the same data.

    Args:
        data: training data, usually without augmentation: a DataLoader, a Dataset, a function that returns one, such as
            `datamodule.train_dataloader`, arrays, or whatever else `evennorm.tools.data.open_data` takes.
        batches: how many to take; all by default.
        batch_size: of arrays and data sets; a DataLoader has its own.
        one_pass: take all statistics in one pass: faster, and exact for the first layers only.
        keep_frozen: leave layers alone that are not trainable.

    Attributes:
        report: what was done when training last ended; None before, and where it could not be done. A warning says why not,
            for example values that are not finite, and the statistics are those of training.

    Raises:
        MissingExtra: lightning is not installed.

    Example:
        >>> import lightning, torch
        >>> from evennorm.torch.lightning import Recalibrate
        >>> data = torch.utils.data.DataLoader(torch.randn(64, 3), batch_size=16)
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[Recalibrate(data)])
    """

    def __init__(
        self,
        data: Any,
        *,
        batches: int | None = None,
        batch_size: int = 128,
        one_pass: bool = False,
        keep_frozen: bool = False,
    ):
        super().__init__()
        self.report: Any = None
        self._data = data
        self._settings = {"batches": batches, "batch_size": batch_size, "one_pass": one_pass, "keep_frozen": keep_frozen}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the data, so that an error in reading it is reported before anything is trained."""
        from evennorm.tools.recalibrate.at_end import AtEnd

        self.report = None
        self._work = AtEnd(self._data, "torch", self._settings | {"measure": False})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.report = self._work.run(pl_module)
