"""Nearest neighbours: torch does the arithmetic, faiss holds the index.

``kmeans`` trains coarse quantisers, ``lists`` makes and reads faiss files as inverted lists, ``search`` goes
through them list by list. All distances are squared L2 in float32.
"""
