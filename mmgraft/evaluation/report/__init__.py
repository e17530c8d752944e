"""Reports of a run: tables, plots, pages."""
