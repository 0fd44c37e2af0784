"""Report of a study: typed rows from the record, then figures, tables, sentences, the page and the model card."""
