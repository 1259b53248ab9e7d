"""Data: from rows that people write to token shards that the engine maps.

`rows` reads files, `chat` renders conversations, `tokenise` makes ids and labels, `shard` writes
them, and `prepare` is the process that does it all behind a run.
"""
