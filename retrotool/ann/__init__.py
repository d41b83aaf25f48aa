"""Nearest-neighbour search with torch and faiss indexes. Distances are squared L2, float32."""
