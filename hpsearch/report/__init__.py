"""From a study to typed rows, from rows to statistics and figures, from both to one HTML page."""
