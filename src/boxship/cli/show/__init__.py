"""How answers are shown: templates, tables, sizes, times, progress."""
