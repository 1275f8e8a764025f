"""The tasks of a run: lm-eval's, those over local files, and a user's own."""

import difflib
import logging
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from self_speculation.harness.logs import is_news

TASKS_FOLDER = Path(__file__).parent / "tasks"
# How many similar names an unknown task is answered with.
NEAR_MATCHES = 4


class LoadedTasks(TaskManager):
    """lm-eval's task manager, with the tasks of a run loaded: every evaluation gets the same ones."""

    def __init__(self, names: list[str], folders: list[str], data_dir: str | None) -> None:
        metadata = {} if data_dir is None else {"data_dir": data_dir}
        paths = [TASKS_FOLDER, *folders]
        # lm-eval's own fifteen thousand names take seconds to read, so they are read only when they are asked for.
        super().__init__(include_path=paths, include_defaults=False, metadata=metadata)
        if not all(self.match_tasks([name]) for name in names):
            super().__init__(include_path=paths, metadata=metadata)
        self.names = [match for name in names for match in self.match_tasks([name]) or self._unknown(name)]
        logging.getLogger("lm_eval.api.task").addFilter(is_news)
        try:
            self.loaded = super().load(self.names)
        except ImportError as error:
            raise ValueError(f"--tasks: a package that {', '.join(names)} needs is missing: {error}.") from error
        except (OSError, ValueError):
            raise
        # What is wrong with rows or with a task's file shows as errors of many kinds, of lm-eval and of datasets.
        except Exception as error:
            raise ValueError(
                f"--tasks: {', '.join(names)} cannot be loaded from its rows and its file ({error})."
            ) from error

    def load(self, task_list: Any) -> Any:
        """What was loaded already."""
        return self.loaded

    @property
    def tasks(self) -> dict[str, Task]:
        """Every task by its name, those of groups too."""
        return self.loaded["tasks"]

    def _unknown(self, name: str) -> list[str]:
        near = difflib.get_close_matches(name, self.all_tasks, NEAR_MATCHES, cutoff=0.5)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ValueError(f"--tasks: {name!r} is not a task{hint}.")
