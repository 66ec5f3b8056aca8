"""See what the optimizer does: where the time goes."""

from distadam.diagnostics.timeline import Timeline, timeline
from distadam.diagnostics.timeline_trace import merge_traces

__all__ = ["Timeline", "merge_traces", "timeline"]
