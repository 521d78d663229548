"""nbformat, imported in a tenth of the time.

jsonschema, which it imports, compiles a grammar of internationalised addresses when it is loaded (two seconds,
each stage anew) to check a format that notebooks do not have; it does without where that package is absent.
"""

import sys

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import nbformat  # noqa: E402

__all__ = ["nbformat"]
