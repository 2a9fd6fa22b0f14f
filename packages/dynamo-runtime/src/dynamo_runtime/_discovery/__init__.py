"""Discovery on a directory (``file``) and in etcd (``etcd``).

``files``, ``keeper``, ``owner`` and ``watches`` belong to the former, ``etcd_*`` to the latter; ``feed`` is what a
watch of a store with change events hands to its reader.
"""
