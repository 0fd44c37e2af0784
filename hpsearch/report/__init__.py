"""Report of a study: typed rows are read from the study folder, and become figures, tables, text and model cards."""
