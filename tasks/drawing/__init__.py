"""The report's figures and page: records in, SVG, PNG and HTML out. No Prefect, no paths, no torch."""
