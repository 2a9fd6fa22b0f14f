"""Discovery on a directory: ``files`` does the I/O, ``watches`` turns views into events, ``file`` is the facade."""
