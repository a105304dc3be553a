"""The evaluators of a run: which ones, with which settings, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlinf_core.contract.evaluation import EvaluatorConfig
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import PluginError, UserError
from rlinf_core.plugins.owners import CORE, Owner, exited

ALWAYS_ON = "held_out"
"""Runs whenever episodes are held out."""


@dataclass(frozen=True)
class Chosen:
    """An evaluator of a run."""

    config: EvaluatorConfig
    owner: Owner

    def __str__(self) -> str:
        return f"evaluator {self.config.type!r}, rlinf_register_evaluators of {self.owner}"

    @contextmanager
    def naming(self, doing: str) -> Iterator[None]:
        """Name the evaluator in errors of the body, as hooks do; core's own user errors are about the user's input."""
        try:
            yield
        except UserError as error:
            if self.owner.distribution == CORE:
                raise
            raise PluginError(f"{error} [{doing} of {self}]") from error
        except SystemExit as error:
            raise PluginError(f"{exited(error)} [{doing} of {self}]") from error
        except Exception as error:
            error.add_note(f"in {doing} of {self}")
            raise


def evaluator_names(run: RunConfig) -> tuple[str, ...]:
    """The types of a run's evaluators, in the order in which they are called."""
    held_out = (ALWAYS_ON,) if run.data.has_validation else ()
    return tuple(dict.fromkeys((*held_out, *run.runner.evaluators)))
