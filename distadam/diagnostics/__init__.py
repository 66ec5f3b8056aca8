"""See what an optimizer does: check its gradients and updates, find the rank that differs, see where the time goes."""

from distadam.diagnostics.agreement import Disagreement, check_parameters
from distadam.diagnostics.beside_torch import Comparison, Difference, compare_with_torch
from distadam.diagnostics.gradient_report import GradientReport, GradientRow
from distadam.diagnostics.gradients import check_gradients
from distadam.diagnostics.live_table import LiveTable
from distadam.diagnostics.monitor import Monitor, monitor
from distadam.diagnostics.prometheus import PrometheusSink
from distadam.diagnostics.ranks import RankCheck, check_ranks
from distadam.diagnostics.sinks import JsonlSink, Sink
from distadam.diagnostics.tensorboard import TensorBoardSink
from distadam.diagnostics.timeline import Timeline, timeline
from distadam.diagnostics.timeline_trace import merge_traces
from distadam.diagnostics.update_report import UpdateReport, UpdateRow
from distadam.diagnostics.updates import UpdateCheck, check_updates
from distadam.diagnostics.watch import Watcher, watch
from distadam.errors import CheckFailed

__all__ = [
    "CheckFailed",
    "Comparison",
    "Difference",
    "Disagreement",
    "GradientReport",
    "GradientRow",
    "JsonlSink",
    "LiveTable",
    "Monitor",
    "PrometheusSink",
    "RankCheck",
    "Sink",
    "TensorBoardSink",
    "Timeline",
    "UpdateCheck",
    "UpdateReport",
    "UpdateRow",
    "Watcher",
    "check_gradients",
    "check_parameters",
    "check_ranks",
    "check_updates",
    "compare_with_torch",
    "merge_traces",
    "monitor",
    "timeline",
    "watch",
]
