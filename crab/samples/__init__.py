"""From a data set to what a model reads: the build and encode stages, and samples that are read as they are needed.

`build` fills a data root, `inputs` turns a record into a prompt, and `encode` lists samples in shards on disk, with
cached features or without. `reading` gives them out one by one. Change `inputs` to show media in another way.
"""
