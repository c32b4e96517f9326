"""Embedding many texts: a file or data set on Ray, or lines as they come."""
