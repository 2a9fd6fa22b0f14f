"""Discovery on a directory (``file``), in etcd (``etcd``) and in Kubernetes (``k8s``).

``files``, ``keeper``, ``owner`` and ``watches`` belong to the first, ``etcd_*`` and ``k8s_*`` to the others, which
share ``connection``, ``tending``, ``followers``, ``feed`` and ``http``; ``lease`` is everybody's.
"""
