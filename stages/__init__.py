"""How one step turns folders into a folder: the verbs of the pipeline and their nouns."""
