"""Notebook widgets of PantheraML: the Python half of the front end in ``widgets/js``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pantheraml import Run

    from pantheraml_widgets.run_panel import RunPanel

__all__ = ["panel"]


def panel(run: Run) -> RunPanel | None:
    """The live panel of a run: the same one each time, so a run has one model in a kernel.

    Parameters
    ----------
    run : pantheraml.Run
        The run to show and steer.

    Returns
    -------
    RunPanel or None
        None where anywidget is not installed: the static record has to do there.
    """
    try:
        import anywidget  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name in ("anywidget", "ipywidgets"):
            return None
        raise
    from pantheraml_widgets.run_panel import panel_of

    return panel_of(run)
