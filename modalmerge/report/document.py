"""Write an HTML page that needs nothing else: style, script, and plotly.js lie in it."""

import html
import json
from collections.abc import Mapping
from typing import Any

from modalmerge.report.style import DRAW, STYLE

# the page may run its own script and show its own images, and load nothing
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, body: str, figures: Mapping[str, Any], *, style: str = "", script: str = "") -> str:
    """Put a page together.

    Args:
        title: plain text.
        body: ready HTML.
        figures: plotly figures by the id of the element that each is drawn into.
        style: rules that only this page needs.
        script: likewise; it runs once the figures are drawn.
    """
    from plotly.offline import get_plotlyjs  # here: the table of the terminal does without plotly

    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<noscript><p class="missing">The charts need JavaScript; every number is in the tables too.</p></noscript>
{body}
<script type="application/json" id="figures">{_script_json(figures)}</script>
<script>{get_plotlyjs()}</script>
<script>
"use strict";
(() => {{{DRAW}{script}}})();
</script>
</body>
</html>
"""


def _script_json(content: Any) -> str:
    """Write JSON that cannot end the script element around it."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
