"""A packed student as an MLflow pyfunc: text in, label or generated text out. Runs in the CPU engine, no PyTorch.

MLflow finds `_load_pyfunc` by name (the model's loader_module). No mlflow import here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdistill_core.engine.model import Engine
from bitdistill_core.templates import packed_template

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

MAX_NEW_TOKENS = 128


class PackedModel:
    """Predicts with a packed file for the task that the file names."""

    def __init__(self, path: Path) -> None:
        self.engine = Engine.load(path)
        task = self.engine.model.task
        if task is None:
            raise ValueError(f"prediction needs a packed file that names its task; got path={path}; pack it with a run")
        self.label_words: list[str] = task["label_words"]
        self.template = packed_template(task)

    def predict(self, data: "pd.DataFrame", params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """Columns `label` and `probability`, or `text` for a generation task, one row for each of `data`.

        Args:
            data: the columns that the task's prompt names; where it names one, `text` does too. A prompt that does not
                fit the window loses its beginning, for a generation task its middle.
            params: max_new_tokens, for a generation task.
        """
        import pandas as pd

        prompts = [self.template.render_prompt(self._row(row)) for row in data.to_dict("records")]
        if self.template.kind == "generation":
            new_tokens = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
            texts = ["".join(self.engine.generate(prompt, new_tokens, truncate=True)).strip() for prompt in prompts]
            return pd.DataFrame({"text": texts}, index=data.index)
        scores = self.engine.score(prompts, [" " + word for word in self.label_words], truncate=True)
        labels = [self.label_words[best] for best in scores.argmax(axis=1)]
        return pd.DataFrame({"label": labels, "probability": np.exp(scores.max(axis=1))}, index=data.index)

    def _row(self, row: dict[Any, Any]) -> dict[str, Any]:
        if len(self.template.columns) == 1 and "text" in row:
            return {self.template.columns[0]: row["text"]}
        return row


def _load_pyfunc(path: str) -> PackedModel:
    return PackedModel(Path(path))
