"""Read rows from files: JSON, JSON lines, parquet, tars, data sets; and index them."""
