"""Several compressions of one model side by side: a sweep over budgets, a comparison of formats."""

from htcompress.report.study import Case, Dense, Point, Study
from htcompress.study.run import Engine, Place, compare, sweep

__all__ = ["Case", "Dense", "Engine", "Place", "Point", "Study", "compare", "sweep"]
