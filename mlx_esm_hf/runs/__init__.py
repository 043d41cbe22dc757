"""Long jobs: chunks, shards, the manifest, ranks, and the files that are made of them. This room knows no model."""
