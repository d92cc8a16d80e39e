"""An inspection as one HTML page that needs no other file: texts escaped, plots as SVG by matplotlib."""

import html
import io
from collections.abc import Sequence
from pathlib import Path

from megagpt.data.files import write_whole
from megagpt.data.inspection import Inspection, describe, range_name, wanted_samples
from megagpt.data.mixture import Mixture
from megagpt.errors import DataError

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere}svg{max-width:100%;height:auto}"
)
_POINTS = 200


def write_page(
    path: str | Path,
    found: Sequence[Inspection],
    texts: Sequence[tuple[str, str]],
    mixture: Mixture | None,
    samples: int,
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        found: one inspection per dataset.
        texts: (title, text) of what else is to be shown.
        mixture: of the run, if there is one.
        samples: how many samples of the mixture are drawn.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Datasets</title><style>{_STYLE}</style>"]
    for one in found:
        parts += [f"<h2>{html.escape(one.prefix)}</h2>", _preformatted("\n".join(describe(one))), _lengths_plot(one)]
    if mixture is not None and samples:
        parts += ["<h2>Mixture</h2>", _mixture_plot(mixture, samples)]
    for title, text in texts:
        parts += [f"<h2>{html.escape(title)}</h2>", _preformatted(text)]
    write_whole(Path(path), "\n".join(parts).encode("utf-8", "replace"))


def _preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _figure():
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise DataError("plots need matplotlib; install it with pip install 'megagpt[inspect]'") from None
    return Figure(figsize=(9, 3.2), layout="constrained")


def _svg(figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _lengths_plot(found: Inspection) -> str:
    """Documents and tokens by length."""
    figure, lengths = _figure(), found.lengths
    names = [range_name(bound) for bound in lengths.bounds]
    for axes, counts, title in zip(
        figure.subplots(1, 2), (lengths.documents, lengths.tokens), ("documents", "tokens"), strict=True
    ):
        axes.bar(range(len(names)), counts)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{title} by length of the document (tokens)", fontsize=9)
    return _svg(figure)


def _mixture_plot(mixture: Mixture, samples: int) -> str:
    """Samples of each dataset over the run, and their distance from what was wanted."""
    figure = _figure()
    read, error = figure.subplots(1, 2)
    at = sorted({samples * i // _POINTS for i in range(_POINTS + 1)})
    counts, wanted = [mixture.counts(n) for n in at], [wanted_samples(mixture, n) for n in at]
    for dataset, name in enumerate(mixture.names):
        read.plot(at, [count[dataset] for count in counts], label=name)
        error.plot(at, [c[dataset] - w[dataset] for c, w in zip(counts, wanted, strict=True)], linewidth=0.8)
    read.set_title("samples read of each dataset", fontsize=9)
    error.set_title("samples read minus samples wanted", fontsize=9)
    read.legend(fontsize=7)
    for axes in (read, error):
        axes.set_xlabel("samples of the run", fontsize=8)
    return _svg(figure)
