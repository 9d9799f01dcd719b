"""What a run leaves for people: records, tables, curves, the report, the progress bar."""
