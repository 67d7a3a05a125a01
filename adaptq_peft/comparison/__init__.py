"""`adaptq compare`: methods side by side on one model and two texts, with the same tokens and the same search."""

from .methods import Method, method_names, resolve_methods
from .settings import StudySettings
from .study import StudyError, run_study
from .texts import StudyTexts, demo_study_texts, read_study_texts

__all__ = [
    "Method",
    "StudyError",
    "StudySettings",
    "StudyTexts",
    "demo_study_texts",
    "method_names",
    "read_study_texts",
    "resolve_methods",
    "run_study",
]
