"""The table of a run file that says what the model learns to do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mpifedlora.core.sections import Section


class TaskConfig(Section):
    """`[task]`: what the model learns to do."""

    name: str = Field(
        "classification",
        description="`classification`: one label a text; `image-classification`: one label an image; "
        "`causal-lm`: a language model learns responses to prompts; or `FILE.py:FUNCTION`: a task of your "
        "own (its code runs in every process).",
    )
    template: Literal["auto", "plain"] = Field(
        "auto",
        description="How `causal-lm` writes prompts and responses. `auto`: by the tokenizer's chat template, "
        "where it has one; `plain`: one line a turn.",
    )
    packing: bool = Field(
        False,
        description="Under `causal-lm`: put several examples of a batch into one row of up to "
        "data.max_length tokens, each of which sees only itself. The same losses with less padding.",
    )
    sha256: str | None = Field(
        None,
        description="SHA-256 of the file of your own task, filled in when the run file is read; where it is "
        "given, the file must match.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="What your own task is given, as it stands here."
    )

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> TaskConfig:
        for key in ("sha256", "options"):
            if getattr(self, key) and ".py:" not in self.name:
                raise ValueError(
                    f'{key} needs a task of your own, got name = "{self.name}"; set name = '
                    f'"FILE.py:FUNCTION", or leave {key} out'
                )
        return self
