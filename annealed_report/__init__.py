"""The report: studies, claims and figures, and the machinery that makes pages of notebooks.

`python -m annealed_report --profile quick` executes the notebooks with the parameters of a profile (`planning`,
`parameters`, `execution`), writes a page of each and an index (`pages`, `markdown`), and `--check` looks for what is
wrong with built pages (`pagecheck`). Notebooks import `plotting`, `figures` and `comparison`.
"""

from annealed_report.parameters import ParameterError, ReportError, check_parameters

__all__ = ["ParameterError", "ReportError", "check_parameters"]
