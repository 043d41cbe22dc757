"""Long jobs: chunks, shards, the manifest, ranks, and the files that are made of them. This room knows no model.

The words: an *item* is a unit of work, a protein for most jobs. A *chunk* is items that are computed together, and
becomes one *shard*, a file on the disk. A *result* is what was computed of an item. A *run* is a folder of shards with
its manifest.
"""
