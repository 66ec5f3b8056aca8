"""What ``distadam doctor`` looks at: each file one part of the machine, each finding with its cure."""

from distadam.doctor.finding import Finding
from distadam.doctor.host import Question, examine

__all__ = ["Finding", "Question", "examine"]
