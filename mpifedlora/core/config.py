"""The configuration of one run, as checked values.

One pydantic model per table of the run file, in `sections` and `method_config`; the rules between them are in
`combinations`. Together they hold every rule that needs no file, no network and no device;
`mpifedlora.io.run_file` turns their errors into one readable message.
"""

from __future__ import annotations

from pydantic import model_validator

from mpifedlora.core.combinations import RULES
from mpifedlora.core.method_config import RunTables


class RunConfig(RunTables):
    """The whole run file, resolved."""

    @model_validator(mode="after")
    def _tables_fit(self) -> RunConfig:
        for rule in RULES:
            rule(self)
        return self
