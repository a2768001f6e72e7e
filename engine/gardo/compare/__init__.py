"""Several runs side by side: what their recipes differ in, and what came of it."""

from gardo.compare.page import write_page
from gardo.compare.runs import Compared, as_data, read

__all__ = ["Compared", "as_data", "read", "write_page"]
