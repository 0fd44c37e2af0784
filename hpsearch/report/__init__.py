"""Report of a study. Typed rows are read from the record and turned into figures, tables, text and model cards."""
