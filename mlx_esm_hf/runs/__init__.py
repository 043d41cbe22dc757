"""The engine of long jobs: chunks, shards, the manifest, and the files that are made from them. It knows no model.

Terms: an *item* is a unit of work, a protein for most jobs. A *chunk* is items that are computed together and becomes
one *shard*, a file on disk. A *result* is what was computed for one item. A *run* is a folder of shards with its
manifest.
"""
