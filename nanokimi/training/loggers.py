"""``--log``: what a run reports to other programs.

The metrics of ``training.metrics`` are written whatever happens here: nothing in this file can end or change a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType

from nanokimi.errors import UserError
from nanokimi.training.log_services import Logger, Reported, TensorBoard, Trackio, Wandb, one_line

LOGGERS: dict[str, tuple[str, Callable[[Reported], Logger]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


class Loggers:
    """All that ``--log`` names. One that fails is switched off with one line; the run and the others go on."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.open: dict[str, Logger] = {}
        self._say = log

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Reports what ``MetricsLog.record`` or ``record_validation`` took for ``step``."""
        numbers = scalars(values) if self.open else {}
        for name, logger in list(self.open.items()):
            try:
                logger.log(step, numbers)
            except Exception as error:
                self.warn(name, error)
                del self.open[name]
                with suppress(Exception):
                    logger.close()

    def close(self) -> None:
        """Closes them all; may be called twice."""
        while self.open:
            name, logger = self.open.popitem()
            try:
                logger.close()
            except Exception as error:
                self.warn(name, error)

    def warn(self, name: str, error: Exception) -> None:
        """The one line about a logger that failed."""
        self._say(f"warning: --log {name} is switched off ({one_line(error)}); the run itself is not affected")


def check_loggers(names: str) -> list[str]:
    """The loggers in the comma-separated ``names``, each once.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if unknown := [name for name in chosen if name not in LOGGERS]:
        raise UserError(f"--log {unknown[0]}: unknown: choose from {', '.join(LOGGERS)}; several with commas")
    for name in chosen:
        if find_spec(LOGGERS[name][0]) is None:
            raise UserError(f"--log {name} needs the package {LOGGERS[name][0]}: pip install 'nanokimi[{name}]'")
    return chosen


def open_loggers(names: str, run: Reported) -> Loggers:
    """Opens every logger in the comma-separated ``names``; one that cannot be opened is left out with a warning.

    Raises:
        UserError: as ``check_loggers``, or nobody is logged in to the service.
    """
    loggers = Loggers(run.log)
    for name in check_loggers(names):
        try:
            loggers.open[name] = LOGGERS[name][1](run)
        except UserError:
            loggers.close()
            raise
        except Exception as error:
            loggers.warn(name, error)
    return loggers


def scalars(values: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers among ``values``, with the names of the history.

    The largest ``max_logit`` stands for those of all layers, and ``expert_imbalance/layer_i`` for the loads of a
    layer's experts: the busiest one's share over the even share, 1 when all are equally busy.
    """
    numbers = dict(values)
    cross_entropy, balance_loss = values.get("train_ce_loss"), values.get("train_aux_loss")
    if isinstance(cross_entropy, float) and isinstance(balance_loss, float):
        numbers["train_loss"] = cross_entropy + balance_loss
    logits, load = values.get("max_logit"), values.get("expert_load")
    if isinstance(logits, list) and isinstance(load, list):
        numbers["max_logit"] = max(filter(math.isfinite, logits), default=None)
        for layer, shares in enumerate(load, start=len(logits) - len(load)):  # dense layers come first
            numbers[f"expert_imbalance/layer_{layer}"] = max(shares) * len(shares)
    return {name: x for name, x in numbers.items() if isinstance(x, (int, float)) and math.isfinite(x)}
