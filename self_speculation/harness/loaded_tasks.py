"""The tasks of a run: lm-eval's, those over local files, and a user's own."""

import difflib
import logging
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from self_speculation.harness.logs import is_news
from self_speculation.harness.trusted_files import code_of_tasks, warn

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
        for place in self._code(folders):
            warn(f"--include_path: the Python code of {place} runs, since a task file names it by !function.")
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

    def _code(self, folders: list[str]) -> list[str]:
        """The Python files of the user's own tasks; of all of them if a group, or a tag, is among those asked for."""
        asked = [self.task_index[name] for name in self.names if name in self.task_index]
        if not all(entry.kind in (Kind.TASK, Kind.PY_TASK) for entry in asked):
            asked = list(self.task_index.values())
        places = [Path(folder).resolve() for folder in folders]
        own = [entry for entry in asked if entry.yaml_path and _lies_in(entry.yaml_path, places)]
        return sorted(set(code_of_tasks(own, (TASKS_FOLDER.resolve(), *map(Path, lm_eval.__path__)))))

    def _unknown(self, name: str) -> list[str]:
        near = difflib.get_close_matches(name, self.all_tasks, NEAR_MATCHES, cutoff=0.5)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ValueError(f"--tasks: {name!r} is not a task{hint}.")


def _lies_in(path: Path, folders: list[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)
