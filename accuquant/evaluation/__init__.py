"""What was lost against full precision, and the report that says so."""
