"""Print how many lines of each script its port changes: `python -m tests.scripts`."""

from tests.scripts import table

print(table())
