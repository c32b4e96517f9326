"""gist-ray: from text triplets to a served embedding model on a Ray cluster."""
