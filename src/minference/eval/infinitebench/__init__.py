"""InfiniteBench (arXiv 2402.13718): its files, prompts and scores, for any model and method.

`files` reads the published JSON lines, `prompts` words them, `scoring` scores an answer as the
benchmark does, `generate` writes its three retrieval tasks without a download.
"""
