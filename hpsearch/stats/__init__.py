"""Statistics of a study: which trial is best. Knows neither the record nor any view of it."""
